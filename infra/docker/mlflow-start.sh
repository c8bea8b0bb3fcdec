#!/bin/sh
# Writes the configuration of basic auth from the environment, makes the workers' user, and starts the server.
set -eu
umask 077
# the file is read with interpolation, so each % is doubled; without the cache MLflow hashes the password several times
# for each request, which takes most of the request's time
written() { printf '%s' "$1" | sed 's/%/%%/g'; }
cat > "$HOME/auth.ini" <<EOF
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = $(written "${MLFLOW_AUTH_DATABASE_URI}")
admin_username = $(written "${MLFLOW_ADMIN_USERNAME}")
admin_password = $(written "${MLFLOW_ADMIN_PASSWORD}")
auth_cache_ttl_seconds = 60
EOF
export MLFLOW_AUTH_CONFIG_PATH="$HOME/auth.ini"
# MLflow reads the addresses, which have passwords, from the environment, because all users can see arguments
: "${MLFLOW_BACKEND_STORE_URI:?}" "${MLFLOW_ARTIFACTS_DESTINATION:?}"
# the server makes the administrator itself; a user sees and changes only what it has made
python - <<'EOF'
import os

from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

name, password = os.environ["MLFLOW_WORKER_USERNAME"], os.environ["MLFLOW_WORKER_PASSWORD"]
users = SqlAlchemyStore()
users.init_db(os.environ["MLFLOW_AUTH_DATABASE_URI"])
(users.update_user if users.has_user(name) else users.create_user)(name, password)
EOF
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --workers 2 --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-*}"
