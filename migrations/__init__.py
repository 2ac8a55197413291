"""The history of the database's tables, one for SQLite and Postgres."""
