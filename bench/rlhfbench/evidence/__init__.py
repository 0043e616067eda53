"""The evidence of a device: everything worth knowing about it, collected by one command in resumable parts."""
