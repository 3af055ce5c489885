"""One small finished run that the tests of this folder share.

A plugin (`pytest_plugins = ["finished"]`), not a conftest: a second conftest would hide `tests/conftest.py` from tests
that import from it.
"""

import pytest
from commandline import STAGES, Chain, cli


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The whole chain, once: data, caption, finetune, index, evaluate, interpret, analyse, report."""
    made = Chain(tmp_path_factory.mktemp("chain") / "run")
    for stage, args in STAGES.items():
        result = cli(*args, "--run", made.run, "--json")
        assert result.code == 0, (stage, result.err)
        made.results[stage] = result
    return made
