"""The HTTP interface of a server: OpenAI's image API, jobs, and a web page."""
