"""A server on Ray Serve: processes that draw, the job table, and the HTTP interface."""
