"""The flows. Importing any of them masks secrets in what the process logs, on a worker too."""

from infra.logs import mask_logs

mask_logs()
