"""Takes ``os.waitid`` away, which Python lacks on macOS before 3.13. A fork server imports it."""

import os

if hasattr(os, "waitid"):
    del os.waitid
