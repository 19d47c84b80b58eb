"""The proof of the analysis on every miniature: all groups at once, in float64."""

import miniatures
import pytest

from qcompile.passes.spaces import analyse, prove

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", sorted(miniatures.BUILDERS))
def test_a_random_element_of_all_groups_preserves_the_function(name):
    spaces = analyse(miniatures.model(name))
    for seed in (0, 1):
        proof = prove(spaces, seed)
        assert proof.holds, f"{name}: relative error {proof.error:.1e}"
        assert proof.spaces > 2
