"""Records: their schema, their file, their data frame."""
