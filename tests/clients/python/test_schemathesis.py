"""schemathesis: each operation of the OpenAPI document with what it allows, and what it does not.

Some rules of the API, such as that a field needs another, are in no schema: so that all of what a
schema allows is accepted is not asked for. Examples are few, and the same each time: more of them
take ``RUVON_EXAMPLES``.
"""

from __future__ import annotations

import os

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

URL = os.environ["RUVON_URL"]
EXAMPLES = int(os.environ.get("RUVON_EXAMPLES", "25"))
SECONDS = 30.0  # for one answer: no hang

schema = schemathesis.openapi.from_url(f"{URL}/openapi.json")


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_an_operation(case):
    case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=SECONDS)
