"""What comes from storage, MLflow or a config is data: no module of ours can make code of it.

Sources are parsed, as in test_floors.py; what is read is then watched by the interpreter itself.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.noise import pack_noise

ROOT = Path(__file__).parents[1]
# Modules that read code or make it; and the one thing that may be taken of one.
MODULES = {
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "shelve",
    "runpy",
    "code",
    "codeop",
    "imp",
    "pty",
}
TAKEN = {"pickle.UnpicklingError"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system": "",
    "os.popen": "",
    "importlib.import_module": "",
    "yaml.load": "",
    "yaml.unsafe_load": "",
    "yaml.full_load": "",
    "OmegaConf.register_new_resolver": "",
    "OmegaConf.register_resolver": "",
    "mlflow.pyfunc.load_model": "",
    "pyfunc.load_model": "",
    "mlflow.pytorch.load_model": "",
    "torch.jit.load": "",
    "torch.hub.load": "",
    "torch.package.PackageImporter": "",
    "pd.read_pickle": "",
    "pandas.read_pickle": "",
    "np.memmap": "",
    "pa.memory_map": "",
    "pa.ipc.open_file": "",
    "pa.deserialize": "",
    "archive.extract": "",
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
}
METHODS = {"extractall"}  # of archives: a member's name would be a path
KEYWORDS = {
    ("shell", True),
    ("allow_pickle", True),
    ("weights_only", False),
    ("trust_remote_code", True),
}


def faults(source: str) -> Iterator[str]:
    """One line for each place in `source` that could run what it reads."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imported = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names):
                imported = [f"{module}.{alias.name}" for alias in names]
            case ast.Attribute(value=ast.Name(id=name)) if name in MODULES:
                imported = [f"{name}.{node.attr}"]
            case ast.Name(id=name, ctx=ast.Load()) if name in BUILT_IN:
                imported = []
                yield f"{node.lineno}: {name}"
            case ast.Call():
                imported = []
                yield from (f"{node.lineno}: {fault}" for fault in call_faults(node))
            case _:
                continue
        for name in imported:
            module = name.partition(".")[0]
            if module in MODULES and name not in TAKEN | {"pickle"}:
                yield f"{node.lineno}: {name}"


def call_faults(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in CALLS:
        wanted, _, value = CALLS[name].partition("=")
        if not wanted or given.get(wanted) != value:
            yield f"{name} without {CALLS[name]}" if wanted else name
    if name.rpartition(".")[2] in METHODS and "." in name:
        yield f"{name}, which makes paths of names"
    for word, setting in KEYWORDS:
        if given.get(word) == str(setting):
            yield f"{name}({word}={setting})"


def test_no_module_can_run_what_it_reads() -> None:
    files = [path for folder in ("ddpm_ray", "jobs") for path in (ROOT / folder).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{one}" for path in files for one in faults(path.read_text())
    ]
    assert not found, "\n".join(found)
    assert len(files) > 60


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "import cloudpickle",
        "def f():\n    import dill",
        "import joblib.externals",
        "eval('1')",
        "f = exec",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "mlflow.pyfunc.load_model(uri)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "archive.extractall(folder)",
        "OmegaConf.register_new_resolver('eval', eval)",
        "pa.memory_map(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_way_would_be_seen(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('a')",
        "import pickle\npickle.UnpicklingError",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "archive.extractfile(info)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "subprocess.run(['a'])",
    ],
)
def test_what_runs_nothing_passes(source: str) -> None:
    assert not list(faults(source))


SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file
from ddpm_ray.assembly.training_run import training_state
from ddpm_ray.assembly import checkpoint_loading as build_trained, diffusers_export
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.shards import fetch_shard
from ddpm_ray.data.loader import ShardStream
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.evaluation.features.inception import Inception
from ddpm_ray.evaluation.features.inception_weights import load_inception
from ddpm_ray.training.checkpoints import CheckpointStore
import torch._dynamo  # what any optimiser imports, which unpickles caches of its own

data, folder = sys.argv[1], Path(sys.argv[2])
torch.manual_seed(0)
layers = Inception((192,)).layers.state_dict()
torch.save(layers, folder / "w.pth")
np.savez(folder / "w.npz", **{name: value.numpy() for name, value in layers.items()})
tiny = ["name=a", "sampling.steps=2", "schedule.num_steps=9", "model.base_channels=4",
        "model.groups=2", "model.channel_mults=[1]", "model.blocks_per_level=1",
        "model.attention_resolutions=[]"]
config = load_config(RunConfig, None, [*tiny, f"data.url={data}"])
facts = {"config": to_dict(config), "image_shape": [4, 4, 1], "data_fingerprint": "f"}
state = training_state(config, ImageShape(4, 4, 1), torch.device("cpu"), facts)
CheckpointStore(str(folder / "run/checkpoints")).save(state.snapshot([]))
model, bin = build_trained.trained_model(str(folder / "run")), "diffusion_pytorch_model.bin"
diffusers_export.write_diffusers(model, SamplingSettings(), folder / "theirs")
weights = folder / "theirs/unet/diffusion_pytorch_model.safetensors"
torch.save(load_file(weights), weights.with_name(bin))  # as old folders have them
weights.unlink()

events = []
WATCHED = ("pickle.find_class", "marshal.loads", "exec", "os.system", "subprocess.Popen",
           "ctypes.dlopen", "mmap.__new__")
sys.addaudithook(lambda event, found: events.append((event, found)) if event in WATCHED else None)
dataset = open_dataset(data)
stream = ShardStream(dataset, seed=0, global_batch_size=4, positions=range(4), lanes=1,
                     window_samples=100)
stream.batch(0)
stream.keys(0)
stream.close()
fetch_shard(dataset, 1)
load_inception(folder / "w.pth", (192,))
load_inception(folder / "w.npz", (192,))
build_trained.trained_model(str(folder / "run"))
build_trained.trained_model(str(folder / "theirs"))
import pickle
pickle.loads(b"cos\\nsystem\\n.")
for event, found in events:
    print(event, *map(repr, found))
"""


def test_reading_shards_weights_and_checkpoints_unpickles_and_runs_nothing(tmp_path: Path) -> None:
    """As the interpreter's own audit events tell it; imports that come late are no data."""
    pack_noise(str(tmp_path / "set"), images=12, side=4)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "set"), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *reported, last = done.stdout.splitlines()
    assert last == "pickle.find_class 'os' 'system'"  # what the script does to be seen
    late = "marshal.loads", "exec <code object <module>"
    assert not [line for line in reported if not line.startswith(late)], done.stdout
