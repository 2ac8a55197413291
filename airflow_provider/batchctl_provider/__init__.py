"""Apache Airflow provider for batchctl: batches of language-model work on your own machines."""

__version__ = "0.1.0"
