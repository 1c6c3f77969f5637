"""One name for one thing, and it is the field's: words that code and pages no longer use.

Most words here were this project's own for a thing that the field has a word for. `NAMES` are parts
of identifiers: `lead` is one of `lead_scale` and of `LeadConfig`. `PROSE` are words of comments,
docstrings, strings, help texts and pages. Both give the word to use instead. `ALLOWED` has the
places where a listed word is right, each with its reason.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("ddpm_ray", "jobs", "benchmarks")
PAGES = (
    "docs",
    "conf",
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "Makefile",
    "cluster.yaml",
    "rayjob.yaml",
    "rayservice.yaml",
)

NAMES = {
    "appraisal|appraise|worth": "schedule diagnostics, prior KL",
    "beside": "conditioning; next_to; others",
    "board|desk|book|ledger": "StopSignals; RunControl; TrialScheduler; TrialStore",
    "card": "RunMetadata",
    "census": "the name of what is counted",
    "certificate": "provenance",
    "crown|crowned": "promote",
    "differing": "changed_keys",
    "eyes": "extract_features",
    "foreign": "interop; the library's name",
    "gallery|hang": "SampleGridLogger, log_grid",
    "glance|heard": "poll; on_event",
    "halve|silence": "downsample_2x; zero_init",
    "hopeless|useless": "rejection_reason; wasted",
    "judge": "PeriodicEvaluator; classifier",
    "keeper": "EmaSnapshotter",
    "knob|knobs": "option",
    "lead|leads|led|leading|leader": "guidance model; is_main; acquire_lease",
    "look": "validation loss; style",
    "lowered|magnify": "low_resolution; upscale",
    "misfit|misfits|misgiven": "incompatibilities; argument_errors",
    "patient|persistently": "set_retry_timeout; retry",
    "predicts": "parameterization",
    "probe|probes|probed": "validation loss",
    "pulse|beat|stood": "heartbeat; stalled_s",
    "sealed": "checksummed",
    "spectrum": "loss by log-SNR",
    "spot": "ModuleLocation",
    "struck|drilled": "FaultResult",
    "told|tell|telling": "reported, logged; sanitize",
    "weaker": "autoguidance_model",
    "wish": "Command",
}
FOLDER_NAMES = {  # words that are right elsewhere: `place` of a row, `answer` of a server
    "ddpm_ray/distributed/*": {"place|places|free": "placement group, remove"},
    "ddpm_ray/diffusion/*": {"answer|answers": "model_output"},
    "ddpm_ray/models/*": {"answer|answers": "model_output"},
    "ddpm_ray/sampling/*": {"answer|answers": "model_output"},
    "ddpm_ray/training/*": {"answer|answers": "model_output"},
}
PROSE = {
    "beside (x_t|training|the workers)": "conditioning; while training goes on; outside the group",
    "birth certificates?|certificates?": "provenance",
    "comes? back from the dead": "wakes after it was replaced",
    "crown(ed|s)?": "promote",
    "desk|ledger|(?<!at a )glances?|wish(es)?": "RunControl; TrialStore; poll; Command",
    "heard|pulse": "on_event; heartbeat",
    "hopeless|useless": "rejected; wasted",
    "judges?|judged": "classifier; compare",
    "knobs?": "option",
    "leaders?|leads samples|led by": "main worker; guides",
    "magnif(y|ies|ied)": "upscale",
    "misfits?": "incompatibility; profile error",
    "probes?|probed": "validation loss; test",
    "sealed|persistently": "checksummed; retry",
    "spectrum|spectra": "loss by log-SNR",
    "strikes?|struck": "inject",
    "the house|the manner|this house": "the code; the style",
    "tells?|told|telling": "report, log, print, name",
    "appraisals?": "schedule diagnostics",
}
# A docstring that starts with one of these needs the code to be understood.
NO_START = re.compile(
    r"(and|as|at|because|but|by|else|everything|for|from|how|if|in|it|near|none|not|nothing|of|on|so"
    r"|they|what|whatever|when|where|with|without)\b",
    re.IGNORECASE,
)
ALLOWED = [  # file, word, reason
    ("ddpm_ray/config/task.py", "predicts", "a trait of classifiers: they predict labels"),
    ("ddpm_ray/config/run.py", "predicts", "a trait of classifiers: they predict labels"),
    ("ddpm_ray/assembly/*", "predicts", "a trait of classifiers: they predict labels"),
    ("ddpm_ray/data/packing/table_files.py", "tell", "a method of Python's files"),
    ("ARCHITECTURE.md", "tell", "Optuna's ask-and-tell interface"),
    ("tests/faults/*", "hang", "a request without an answer hangs"),
    ("*/*likelihood*.py", "probe*", "Hutchinson's estimator of a trace has probes"),
    ("benchmarks/gpu/cases.py", "probe", "Hutchinson's estimator of a trace has probes"),
    ("ddpm_ray/tracking/errors.py", "certificate", "of TLS"),
    ("ddpm_ray/evaluation/*", "certificate", "key of stored scores"),
    ("ddpm_ray/runs/*", "certificate", "key of stored scores"),
    ("ddpm_ray/sweep/*", "certificate", "key of stored scores"),
    ("benchmarks/sweeps.py", "certificate", "key of stored scores"),
    ("ddpm_ray/runs/evaluation/ema_search.py", "misfit*", "key of stored results"),
    ("ddpm_ray/sweep/trial_store.py", "appraisal", "key of stored trials"),
    ("ddpm_ray/sweep/trial_store.py", "probes", "key of stored trials"),
    ("ddpm_ray/training/state.py", "probes", "key of stored checkpoints"),
    ("ddpm_ray/sweep/*", "spectrum", "key of stored trials"),
    ("ddpm_ray/training/validation_loss.py", "spectrum", "key of stored trials"),
    ("benchmarks/sweeps.py", "spectrum", "key of stored trials"),
    ("ddpm_ray/config/*", "useless*", "a former key"),
    ("ddpm_ray/config/*", "spectrum*", "a former key"),
    ("ddpm_ray/config/*", "lead", "a former key"),
    ("CHANGELOG.md", "crowned", "a former key"),
    ("CHANGELOG.md", "useless*", "a former key"),
    ("CHANGELOG.md", "spectrum*", "a former key"),
]


def parts_of(name: str) -> set[str]:
    """The words of an identifier, in lower case."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return {word.lower() for word in words}


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each line of a comment or a string."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield from enumerate(token.string.splitlines(), token.start[0])


def is_allowed(file: str, word: str) -> bool:
    return any(fnmatch(file, place) and fnmatch(word, of) for place, of, _ in ALLOWED)


def found_names(file: str, source: str) -> Iterator[str]:
    rules = dict(NAMES)
    for folder, more in FOLDER_NAMES.items():
        rules |= more if fnmatch(file, folder) else {}
    instead = {word: term for words, term in rules.items() for word in words.split("|")}
    for line, name in identifiers(source):
        for word in sorted(parts_of(name) & instead.keys()):
            if not is_allowed(file, word):
                yield f"{file}:{line}: {name}: say {instead[word]}"


def found_prose(file: str, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for number, line in lines:
        for words, term in PROSE.items():
            for match in re.finditer(rf"\b({words})\b", line, re.IGNORECASE):
                if not is_allowed(file, match[0].lower()):
                    yield f"{file}:{number}: {match[0]}: say {term}: {line.strip()}"


def starts(file: str, source: str) -> Iterator[str]:
    """One line for each docstring that starts as in `NO_START`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or "-"
            if NO_START.match(text):
                yield f"{file}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"


def files_of(*places: str) -> Iterator[tuple[str, str]]:
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".md", ".yaml") or file.name == "Makefile":
                yield str(file.relative_to(ROOT)), file.read_text()


def code() -> Iterator[tuple[str, str]]:
    return ((file, source) for file, source in files_of(*CODE) if file.endswith(".py"))


def test_names_are_the_fields() -> None:
    assert not [line for file, source in code() for line in found_names(file, source)]


def test_names_in_tests_are_the_fields() -> None:
    """Names of tests are sentences in common English, and tests of former keys name these."""
    found = [
        line
        for file, source in files_of("tests")
        if file.endswith(".py") and not file.endswith(("test_words.py", "test_former_keys.py"))
        for line in found_names(file, source)
        if ": test_" not in line and not file.startswith("tests/golden/")
    ]
    assert not found


def test_sentences_are_the_fields() -> None:
    assert not [line for file, source in code() for line in found_prose(file, texts(source))]


def test_a_docstring_starts_with_a_verb_or_names_the_thing() -> None:
    assert not [line for file, source in code() for line in starts(file, source)]
    assert [*starts("a.py", 'def f():\n    """Of each image."""\n')]


def test_pages_and_configs_are_in_the_fields_words() -> None:
    pages = ((file, enumerate(text.splitlines(), 1)) for file, text in files_of(*PAGES))
    assert not [line for file, lines in pages for line in found_prose(file, iter(lines))]


def test_each_exception_is_needed() -> None:
    """An exception whose word is gone from its files is deleted with it."""
    everything = [*code(), *files_of(*PAGES, "tests")]

    def is_there(place: str, word: str) -> bool:
        at = re.compile(rf"(?<![a-z]){word.replace('*', '[a-z_]*')}(?![a-z])", re.IGNORECASE)
        return any(fnmatch(file, place) and at.search(text) for file, text in everything)

    assert not [(place, word) for place, word, _ in ALLOWED if not is_there(place, word)]


@pytest.mark.parametrize(
    "source, count",
    [
        ("class LeadConfig: ...\n", 1),
        ("kept_look = told(x)\n", 2),
        ("overlook = leadership\n", 0),
    ],
)
def test_a_name_is_read_word_by_word(source: str, count: int) -> None:
    ast.parse(source)
    assert len([*found_names("ddpm_ray/a.py", source)]) == count


def test_a_word_in_a_sentence_is_found() -> None:
    source = '"""What is told."""\nx = 1  # the leader\nraise ValueError(f"{x} tells")\n'
    assert len([*found_prose("ddpm_ray/a.py", texts(source))]) == 3
