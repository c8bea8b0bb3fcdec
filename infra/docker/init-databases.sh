#!/bin/sh
# PostgreSQL's image runs this script once, while its volume is empty: it makes one database for each server.
set -eu
for name in prefect mlflow mlflow_auth; do
  psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --command "CREATE DATABASE $name"
done
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname prefect --command "CREATE EXTENSION IF NOT EXISTS pg_trgm"
