"""The configs that the package ships, found by name: `digits` of train is conf/train/digits.yaml.

`ddpm_ray/conf` is a link to `conf/` in the repository and a folder in the installed package.
"""

from pathlib import Path
from typing import Any

from ddpm_ray.config.reading.errors import ConfigError
from ddpm_ray.config.reading.nearest import did_you_mean

FOLDER = Path(__file__).parents[2] / "conf"


def folder_of(kind: Any) -> str:
    """Return the name of the folder with the configs of the class `kind`, if any are shipped."""
    return getattr(kind, "shipped_in", "")


def shipped_names(kind: Any) -> list[str]:
    """Return the names of the shipped configs of the class `kind`."""
    folder = folder_of(kind)
    return sorted(path.stem for path in (FOLDER / folder).glob("*.yaml")) if folder else []


def config_file(kind: Any, given: str) -> Path:
    """Return the path of a config of the class `kind`: a file, or else the name of a shipped one.

    Raises ConfigError where there is neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    names = shipped_names(kind)
    if "=" in given:
        example = f", as {FOLDER.name}/{folder_of(kind)}/{names[0]}.yaml {given}" if names else ""
        raise ConfigError(f"{given}: the config file comes first, then key=value{example}")
    if given in names:
        return FOLDER / folder_of(kind) / f"{given}.yaml"
    if path.is_dir() or path.suffix or "/" in given or not names:
        folder = path if path.is_dir() else path.parent
        reason = "is a folder, not a file" if path.is_dir() else "no such file"
        others = ", ".join(sorted(map(str, folder.glob("*.yaml")))) or "no *.yaml"
        raise ConfigError(f"{given}: {reason}; here are: {others}")
    other = next((found.parent.name for found in FOLDER.glob(f"*/{given}.yaml")), "")
    hint = f"; `ddpm-ray {other}` ships it" if other else did_you_mean(given, names)
    raise ConfigError(
        f"{given}: no such file, and no such config is shipped; there are: {', '.join(names)}{hint}"
    )
