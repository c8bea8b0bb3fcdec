"""Make GET /health/ready answer 200, as RustFS does: an object that all may read."""

import boto3

keys = {"aws_access_key_id": "ready", "aws_secret_access_key": "ready"}
s3 = boto3.client("s3", endpoint_url="http://127.0.0.1:9000", region_name="us-east-1", **keys)
s3.create_bucket(Bucket="health")
s3.put_object(Bucket="health", Key="ready", Body=b"ok", ACL="public-read")
