"""Workers of a fleet: Celery processes pinned to devices, and what starts them."""
