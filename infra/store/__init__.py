"""One object store over a folder or an S3 bucket."""
