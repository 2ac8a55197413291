"""What Airflow reads of this provider at its start; plain data, nothing is imported."""

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the provider's description."""
    return {
        "package-name": "airflow-provider-batchctl",
        "name": "batchctl",
        "description": "Batches of language-model work on a batchctl server.",
        "versions": ["0.1.0"],
        "integrations": [{"integration-name": "batchctl", "tags": ["ai", "llm", "service"]}],
        "hooks": [
            {
                "integration-name": "batchctl",
                "python-modules": ["batchctl_provider.hooks.batchctl"],
            }
        ],
        "operators": [
            {
                "integration-name": "batchctl",
                "python-modules": ["batchctl_provider.operators.batchctl"],
            }
        ],
        "sensors": [
            {
                "integration-name": "batchctl",
                "python-modules": ["batchctl_provider.sensors.batchctl"],
            }
        ],
        "triggers": [
            {
                "integration-name": "batchctl",
                "python-modules": ["batchctl_provider.triggers.batchctl"],
            }
        ],
        "connection-types": [
            {
                "connection-type": "batchctl",
                "hook-class-name": "batchctl_provider.hooks.batchctl.BatchctlHook",
                "hook-name": "batchctl",
                "conn-fields": {
                    "timeout_seconds": {
                        "label": "Time-out (seconds)",
                        "description": "How long one call waits for the server to send something.",
                        "schema": {"type": ["number", "null"], "default": 120},
                    },
                    "patience_seconds": {
                        "label": "Patience (seconds)",
                        "description": "How long a call is repeated while the server is away.",
                        "schema": {"type": ["number", "null"], "default": 60},
                    },
                    "ca_file": {
                        "label": "CA file",
                        "description": "Certificates to trust, where the server has its own.",
                        "schema": {"type": ["string", "null"]},
                    },
                },
                "ui-field-behaviour": {
                    "hidden-fields": ["schema", "login", "port"],
                    "relabeling": {"host": "Base URL", "password": "API key"},
                    "placeholders": {"host": "http://batch.example:8000"},
                },
            }
        ],
    }
