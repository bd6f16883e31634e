"""The code of a registered model, which MLflow copies beside it and runs to load it: no module to import.

`mlflow models serve` answers {"inputs": [{"head": "…", "relation": "…", "k": 10}, …]}; see
`distkgd.tracking.serving.questions`. DISTKGD_QUERY_BITS=8 in its environment rounds queries, of a packed model.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy
import pandas
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from distkgd.errors import ConfigError, DistkgdError
from distkgd.evaluation.trained_model import load
from distkgd.tracking.serving.questions import answer_questions


class Endpoint(PythonModel):
    """A finished model that answers questions; what is wrong with one becomes HTTP status 400."""

    def load_context(self, context: Any) -> None:
        """Load the model folder that was registered."""
        asked = os.environ.get("DISTKGD_QUERY_BITS", "32")
        if asked not in ("8", "32"):
            raise ConfigError(f"DISTKGD_QUERY_BITS is {asked[:40]!r}; allowed: 8, and 32, which rounds no query.")
        self._model = load(context.artifacts["model"], query_bits=int(asked))

    def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> list[dict[str, Any]]:
        """One answer per question: a row of `model_input`, or a mapping in it where it is a list."""
        try:
            return answer_questions(self._model, records_of(model_input))
        except DistkgdError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def records_of(given: Any) -> list[Any]:
    """Questions as MLflow hands them over: a frame, a mapping of columns, or a list of mappings, of numpy's values."""
    if isinstance(given, Mapping):
        given = pandas.DataFrame({key: numpy.atleast_1d(column) for key, column in given.items()})
    if isinstance(given, pandas.DataFrame):
        given = given.astype(object).where(given.notna(), None).to_dict("records")
    return [{key: plain(value) for key, value in one.items()} if isinstance(one, Mapping) else one for one in given]


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return value.tolist() if isinstance(value, numpy.ndarray | numpy.generic) else value


set_model(Endpoint())
