#!/bin/sh
# Writes the file that basic auth is configured by, from the environment, and starts the server.
set -eu
umask 077
# the file is read with interpolation, where a % is written twice
written() { printf '%s' "$1" | sed 's/%/%%/g'; }
cat > "$HOME/auth.ini" <<EOF
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = $(written "${MLFLOW_AUTH_DATABASE_URI}")
admin_username = $(written "${MLFLOW_ADMIN_USERNAME}")
admin_password = $(written "${MLFLOW_ADMIN_PASSWORD}")
EOF
export MLFLOW_AUTH_CONFIG_PATH="$HOME/auth.ini"
# the store's address has a password: MLflow reads both from the environment, since arguments are seen by everybody
: "${MLFLOW_BACKEND_STORE_URI:?}" "${MLFLOW_ARTIFACTS_DESTINATION:?}"
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --workers 2 --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-*}"
