"""The wheel in an environment of its own, used from another folder."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
synth: {people: 12, images_per_person: 3, size: [64, 32]}
method: {name: bdam, depth: 1, heads: 2, fusion: {sequence: pair, width: 16, out_dim: 32}}
backbone: {spec: vit-bert:micro}
train: {epochs: 1, batch: 8, instances: 2, lr: 1.0e-3, warmup_epochs: 0}
"""


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources without anything that git does not know."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "reidctl", source / "reidctl", ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    if not (source / "README.md").exists():
        (source / "README.md").write_text("reidctl\n")
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    run(sys.executable, "-c", build, cwd=source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A venv with the wheel; the dependencies come from this one, nothing is downloaded."""
    home = tmp_path_factory.mktemp("venv") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    scheme = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    # Lines of a .pth file are put on the path, but .pth files there are not read: an editable reidctl stays behind.
    ours = [sysconfig.get_path("purelib"), *site.getsitepackages()]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in ours))
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check", "install"]
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel)
    return home


def environment(home):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "REIDCTL"))}
    return kept | {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_no_other_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "reidctl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == here
    data = "backbones/tiny_vocab.txt captioning/lexicon.yaml evaluation/published.yaml py.typed recipes/bdam-tiny.yaml"
    page = "report/page.html report/page.css report/page.js"
    assert {f"reidctl/{name}" for name in f"{data} {page}".split()} <= held


@pytest.mark.slow
def test_the_installed_command_runs_the_quickstart_from_another_folder(installed, tmp_path):
    env = environment(installed)
    where = run("python", "-c", "import reidctl; print(reidctl.__file__)", cwd=tmp_path, env=env).stdout.strip()
    assert Path(where).is_relative_to(installed)
    command = installed / "bin" / "reidctl"
    assert "finetune" in run(command, "--help", cwd=tmp_path, env=env).stdout
    assert "bdam-icme" in run(command, "methods", cwd=tmp_path, env=env).stdout
    recipe = tmp_path / "small recipe.yaml"
    recipe.write_text(RECIPE)
    script = ROOT / "pipelines" / "quickstart.sh"
    done = run("bash", script, cwd=tmp_path, env=env | {"RECIPE": str(recipe)})
    page = tmp_path / "runs" / "quickstart" / "report" / "report.html"
    assert page.stat().st_size > 10_000 and (tmp_path / "runs" / "quickstart" / "search.png").is_file()
    for word in ("chance", "colour histogram", "rank1", "mINP"):
        assert word in done.stdout
