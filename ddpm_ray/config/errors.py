"""The error of an invalid config."""


class ConfigError(ValueError):
    """An invalid config; one line for each bad key."""
