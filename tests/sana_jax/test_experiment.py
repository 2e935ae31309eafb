"""Config files and overrides: what is right is read, what is wrong is named before a device is touched."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from sana_jax import experiment
from sana_jax.data.synthetic import Synthetic
from sana_jax.data.tar import Tar
from sana_jax.errors import InputError

DEBUG = pathlib.Path(__file__).parents[2] / "configs" / "debug.py"
HEAD = """
from sana_jax.data.synthetic import Synthetic
from sana_jax.experiment import *
from sana_jax.experiment import AdamW, DCAE, Flow, Gemma2, LanguageModel, Autoencoder, Sana
"""
TOY = (
    HEAD
    + """
config = Experiment(
    model=Sana(width=64, depth=2, heads=2, cross_heads=2, caption_width=32), objective=Flow(),
    data=Data(Synthetic(8, 64), batch=8, size=64, buckets=False), optim=Optim(AdamW()), steps=10,
    frozen=Frozen(dc_ae="sana-1.6b", text="sana-1.6b"),
)
"""
)
STAGES = (
    HEAD
    + """
data = Data(Synthetic(8, 64), batch=8, size=64, buckets=False)
first = Experiment(
    name="first", model=DCAE(widths=(16, 16, 16, 16, 16, 32), head_dim=16), objective=Autoencoder(), data=data,
    optim=Optim(AdamW(), lr=1), steps=3,
)
second = Experiment(
    name="second", model=Sana(width=64, depth=2, heads=2, cross_heads=2, caption_width=32), objective=Flow(),
    data=data, optim=Optim(AdamW()), steps=4, frozen=Frozen(dc_ae="stage:first", text="sana-1.6b"),
)
config = Experiment(stages=(first, second))
"""
)


@pytest.fixture
def write(tmp_path):
    def put(text, name="toy"):
        file = tmp_path / f"{name}.py"
        file.write_text(textwrap.dedent(text))
        return str(file)

    return put


def test_both_spellings_of_an_override(write):
    path = write(TOY)
    config = experiment.load(path, ["optim.lr=2e-5", "--data.batch=64", "workdir=runs/a"], run=True)
    assert config.optim.lr == 2e-5 and config.data.batch == 64 and config.workdir == "runs/a"
    assert config.name == "toy" and config.steps == 10
    assert config == dataclasses.replace(
        experiment.load(path),
        workdir="runs/a",
        optim=dataclasses.replace(config.optim, lr=2e-5),
        data=dataclasses.replace(config.data, batch=64),
    )


BAD = [  # argument, what the message must hold
    ("optim.lrr=1", "did you mean 'lr'"),
    ("optm.lr=1", "did you mean 'optim'"),
    ("steeps=1", "did you mean 'steps'"),
    ("model.dept=3", "did you mean 'depth'"),
    ("objective.shft=3", "did you mean 'shift'"),
    ("data.source.record=3", "did you mean 'records'"),
    ("optim.rule.b4=.9", "optim.rule has b1, b2, eps, weight_decay"),
    ("seed.x=1", "seed=0 has no fields"),
    ("--steps", "must look like"),
    ("steps", "must look like"),
    ("steps=ten", "an integer"),
    ("steps=1.5", "an integer"),
    ("steps=0", "steps=0: must be at least 1"),
    ("steps=-5", "steps=-5"),
    ("seed=-1", "seed=-1"),
    ("optim.lr=fast", "a finite number"),
    ("optim.lr=0", "more than 0"),
    ("optim.lr=nan", "a finite number"),
    ("optim.lr_rule=sqr", "did you mean 'sqrt'"),
    ("optim.decay=cosin", "did you mean 'cosine'"),
    ("optim.ema=1", "optim.ema=1.0"),
    ("optim.clip=-1", "optim.clip=-1.0"),
    ("optim.warmup=-1", "optim.warmup=-1"),
    ("optim.rule.b1=1.5", "optim.rule.b1=1.5"),
    ("optim.accumulate=3", "must divide data.batch=8"),
    ("optim.freeze=('blocks/self_atn/.*',)", "matches no parameter"),
    ("optim.freeze=('blocks(',)", "is no pattern"),
    ("optim.freeze=('.*',)", "leaves nothing to train"),
    ("optim.no_decay=('nothing',)", "optim.no_decay: 'nothing' matches no parameter"),
    ("data.batch=0", "data.batch=0"),
    ("data.batch=none", "an integer"),
    ("data.size=100", "nearest 96"),
    ("data.buckets=yes", "true or false"),
    ("data.buckets=true", "data.buckets=false takes squares"),
    ("data.buckets=((64, 64), (64, 100))", "data.buckets: side 100: must be a multiple of 32, the pixels of a latent, up to 16384; nearest 96"),
    ("data.buckets=((64, 64), (64, 163840))", "data.buckets: side 163840: must be a multiple of 32, the pixels of a latent, up to 16384; nearest 16384"),
    ("data.buckets=((64, 64), (64, 64))", "must be false, true, or different sizes"),
    ("data.buckets=()", "must be false, true, or different sizes"),
    ("data.buckets=(64, 64)", "true or false or a tuple"),
    ("data.bad_share=2", "at most 1"),
    ("data.captions.how=powr", "did you mean 'power'"),
    ("data.captions=first", "must be Captions(...)"),
    ("data.source=/no/such/folder", "data.source=/no/such/folder: no such file or folder"),
    ("model.heads=3", "model.heads=3: must divide width=64"),
    ("model.dtype=bf17", "did you mean 'bf16'"),
    ("model.remat=ful", "did you mean 'full'"),
    ("model.kernels=xal", "did you mean 'xla'"),
    ("model.width=0", "model"),
    ("objective.caption_dropout=1.5", "at most 1"),
    ("objective.shift=0", "more than 0"),
    ("init.weights=/no/such/run", "no such folder or file"),
    ("init.weights=sana-1.6", "did you mean 'sana-1.6b'"),
    ("init.weights=stage:first", "of which there is none"),
    ("init.grow=1", "needs init.weights"),
    ("init.grow=2", "must be less than model.depth=2"),
    ("frozen.dc_ae=", "frozen.dc_ae: is not given"),
    ("frozen.text=", "frozen.text: is not given"),
    ("mesh.fsdp=0", "mesh.fsdp=0"),
    ("mesh.fsdp=-1", "only one of"),
    ("preview.prompts=('a cat', 3)", "must be a tuple of a text"),
    ("preview.prompts=(' ',)", "is empty"),
    ("preview.size=100", "preview.size=100"),
    ("checkpoint.keep=0", "checkpoint.keep=0"),
    ("log.every=0", "log.every=0"),
    ("reliability.hang_seconds=0", "more than 0"),
    ("workdir=", "workdir: is not given"),
    ("workdir={file}", "is a file"),
]


@pytest.mark.parametrize("recall, words", [(-1, "objective.recall=-1"), (32, "must be less than model.width=32")])
def test_what_a_state_cannot_recall(recall, words):
    with pytest.raises(InputError, match=words):
        experiment.load(DEBUG, ["stage=text", f"text.objective.recall={recall}"])


@pytest.mark.parametrize("argument, words", BAD, ids=[argument for argument, _ in BAD])
def test_one_bad_argument(write, argument, words):
    path = write(TOY)
    arguments = [argument.format(file=path)] + ["workdir=runs/a"] * (not argument.startswith("workdir"))
    start = time.process_time()
    with pytest.raises(InputError) as raised:
        experiment.load(path, arguments, run=True)
    assert words in str(raised.value)
    assert time.process_time() - start < 1


def test_all_problems_are_in_one_error(write):
    path = write(TOY)
    arguments = ["optim.lrr=1", "steps=0", "data.bach=2", "model.heads=3", "mesh.tensor=0", "x"]
    with pytest.raises(InputError) as raised:
        experiment.load(path, arguments, run=True)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{path}: 7 problems"
    for word in ("lrr", "steps=0", "bach", "heads=3", "mesh.tensor", "'x'", "workdir"):
        assert sum(word in line for line in lines[1:]) == 1, word


def test_problems_of_a_file_of_its_own(write):
    with pytest.raises(InputError, match=r"4 problems"):
        wrong = TOY.replace("batch=8", "batch='8'").replace("steps=10", "steps=1.5, seed=True, workdir=3")
        experiment.load(write(wrong))


FILES = [  # what the file says, what the message must hold
    ("config = (", "line 1"),
    ("x = 1", "must bind `config` to an Experiment"),
    ("config = {}", "is dict"),
    ("raise ValueError('so')", "line 1: ValueError: so"),
    ("import nothing_of_that_name", "ModuleNotFoundError"),
    ("raise SystemExit", "SystemExit"),
    (HEAD + "config = Experiment(optim=Optim(AdamW(), lrr=1))", "line 5: Optim has no field 'lrr'; did you mean 'lr'"),
    (HEAD + "config = Experiment(modl=Sana())", "Experiment has no field 'modl'; did you mean 'model'"),
    (HEAD + "config = Experiment()", "4 problems"),
    (TOY.replace("objective=Flow()", "objective=Autoencoder()"), "Autoencoder trains a DCAE, model is a Sana"),
    (STAGES.replace("objective=Autoencoder()", "objective=LanguageModel(3)", 1), "LanguageModel trains a Gemma2, model is a DCAE"),
    (TOY.replace("objective=Flow()", "objective='flow'"), "objective='flow'"),
    (TOY.replace("AdamW()", "'adamw'"), "optim.rule='adamw': must be AdamW(...) or CAME(...)"),
    (TOY.replace("Synthetic(8, 64)", "'synthetic'"), "data.source='synthetic': must be Source(...)"),
    (HEAD + "config = Experiment(stages=(Experiment(),))", "stages must be Experiments with names"),
    (STAGES.replace('"second"', '"first"'), "names of their own"),
    (STAGES.replace("stage:first", "stage:second"), "second.frozen.dc_ae='stage:second': must name one of"),
]


@pytest.mark.parametrize("text, words", FILES, ids=range(len(FILES)))
def test_one_bad_file(write, text, words):
    with pytest.raises(InputError) as raised:
        experiment.load(write(text))
    assert words in str(raised.value)


def test_a_file_that_is_not_there(write):
    path = write(TOY)
    with pytest.raises(InputError, match="did you mean .*toy.py"):
        experiment.load(path.replace("toy", "tay"))


def test_neither_a_device_nor_long(write):
    """A process in which jax could find no device names a problem and does not try one."""
    code = f"""
        import time, sys
        from sana_jax import experiment
        start = time.process_time()
        try:
            experiment.load({write(TOY)!r}, ["optim.lrr=1", "model.heads=3"], run=True)
        except ValueError as error:
            print(time.process_time() - start, str(error).count("heads=3"), sep="\\n")
    """
    environment = {"JAX_PLATFORMS": "none_such"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seconds, named = done.stdout.split()
    assert float(seconds) < 1 and named == "1"


def test_derived(write):
    write(TOY)
    text = """
        from sana_jax.experiment import derived
        config = derived(__file__, "toy", {"model.depth": 4, "optim.rule.b2": 0.99, "data.source": DATA})
    """
    config = experiment.load(write(text.replace("DATA", "__import__('sana_jax.data.tar').data.tar.Tar('x')"), "deep"))
    assert config.model.depth == 4 and config.model.width == 64 and config.optim.rule.b2 == 0.99
    assert config.data.source == Tar("x") and config.name == "deep" and config.steps == 10
    with pytest.raises(InputError, match="(?s)changes of toy.py.*did you mean 'depth'"):
        experiment.load(write(text.replace("model.depth", "model.dept").replace("DATA", "'/none'"), "deep"))


def test_a_source_from_its_path(write, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    config = experiment.load(write(TOY), [f"data.source={tmp_path / 'pictures'}"])
    assert type(config.data.source).__name__ == "Folder" and config.data.source.path == str(tmp_path / "pictures")


def test_stages(write):
    path = write(STAGES)
    config = experiment.load(path, ["workdir=RUN", "first.optim.lr=2e-3", "second.steps=9"], run=True)
    first, second = config.stages
    assert (first.workdir, second.workdir) == ("RUN/first", "RUN/second")
    assert second.frozen == experiment.Frozen("RUN/first", "sana-1.6b") and second.steps == 9
    assert first.optim.lr == 2e-3
    assert type(experiment.load(path).stages[0].optim.lr) is float  # 1 in the file
    (alone,) = experiment.load(path, ["workdir=RUN", "stage=second"], run=True).stages
    assert alone == experiment.load(path, ["workdir=RUN"]).stages[1] == experiment.load_one(path, ["workdir=RUN", "stage=second"])
    with pytest.raises(InputError, match="has several stages; choose one with stage=NAME: first, second"):
        experiment.load_one(path, ["workdir=RUN"])
    for argument, words in (
        ("steps=3", "begins with none of the stages first, second"),
        ("secnd.steps=3", "did you mean 'second'"),
        ("stage=secnd", "did you mean 'second'"),
        ("second.steps=0", "second.steps=0"),
    ):
        with pytest.raises(InputError, match=words):
            experiment.load(path, [argument, "workdir=RUN"], run=True)


def test_a_run_goes_on_with_some_changes_only(write):
    path = write(TOY)
    old = json.loads(json.dumps(experiment.describe(experiment.load(path, ["workdir=a"]))))
    assert experiment.changes(old, experiment.load(path, ["workdir=a"])) == []
    allowed = ["workdir=b", "steps=20", "optim.lr=2e-5", "log.every=5", "data.workers=2", "model.remat=full"]
    allowed += ["model.kernels=xla", "model.unroll=2"]
    lines = experiment.changes(old, experiment.load(path, allowed))
    assert len(lines) == 8 and "optim.lr: 0.0001 -> 2e-05" in lines
    forbidden = ["model.depth=3", "data.batch=16", "seed=7", "data.source.seed=1", "optim.ema=0.9", "objective.shift=4"]
    for argument in forbidden:
        with pytest.raises(InputError, match=argument.split("=")[0]):
            experiment.changes(old, experiment.load(path, [argument, "steps=20"]))
    with pytest.raises(InputError) as raised:
        experiment.changes(old, experiment.load(path, forbidden + allowed))
    assert str(raised.value).count("->") == len(forbidden) and "steps" not in str(raised.value)
    del old["preview"]["steps"], old["objective"]["shift"]  # of a version that had no such fields
    assert len(experiment.changes(old, experiment.load(path, ["workdir=a"]))) == 2


def test_the_scale_of_latents_may_change_behind_an_autoencoder():
    """It does not enter the loss, and is measured when the training is over."""
    config = next(one for one in experiment.load(DEBUG, ["workdir=a"]).stages if one.name == "autoencoder")
    other = dataclasses.replace(config, model=config.model.clone(scaling_factor=0.7))
    (line,) = experiment.changes(experiment.describe(config), other)
    assert line == f"model.scaling_factor: {config.model.scaling_factor} -> 0.7"


def test_a_config_is_one_hashable_value(write):
    config = experiment.load(write(TOY))
    assert hash(config) == hash(experiment.load(write(TOY)))
    assert config.data.source == Synthetic(8, 64)


def test_checks_ask_for_no_device(tmp_path):
    """Or the processes of a job could not meet any more: JAX wants to know of them first."""
    code = "from sana_jax import experiment; from jax._src import xla_bridge as b; "
    code += "experiment.load('configs/sana_600m_512.py', ['workdir=x']); assert not b.backends_are_initialized(); "
    code += "import jax; jax.devices(); assert b.backends_are_initialized()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
