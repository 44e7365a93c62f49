"""For plugin authors: conformance suites that say whether a tier, a detector, a check or a format keeps its contract.

Subclass a suite in a test module, give it the object under test as a pytest fixture, and pytest runs the contract:

    class TestMyTier(TierSuite):
        @pytest.fixture
        def tier(self, tmp_path):
            return MyTier(tmp_path)

Nothing here imports pytest, so the suites load wherever ckptd does.
"""

from ckptd.testing.detector import DetectorSuite
from ckptd.testing.format import FormatSuite
from ckptd.testing.node_check import NodeCheckSuite
from ckptd.testing.racing import race
from ckptd.testing.tier import TierSuite

__all__ = ["DetectorSuite", "FormatSuite", "NodeCheckSuite", "TierSuite", "race"]
