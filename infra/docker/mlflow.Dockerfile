# MLflow's server with PostgreSQL, S3 and basic auth, which MLflow's own image does not have.
FROM python:3.11.17-slim-trixie
ENV PIP_NO_CACHE_DIR=1 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
COPY constraints.txt /tmp/
RUN pip install --constraint /tmp/constraints.txt "mlflow[auth]" psycopg2-binary boto3 \
    && groupadd --gid 10001 mlflow && useradd --uid 10001 --gid mlflow --create-home mlflow
USER mlflow
WORKDIR /home/mlflow
COPY infra/docker/mlflow-start.sh /usr/local/bin/mlflow-start
CMD ["sh", "/usr/local/bin/mlflow-start"]
