"""The loops that move batches on: one code for a Celery worker and for one machine by itself."""
