"""Learning from examples in the context, on tasks whose right answers can be computed.

    functions      prompts of random functions: linear, sparse, of a finite set of tasks, not linear; a curriculum
    regressor      InContextRegressor: a causal transformer that reads examples of a function
    predictors     what least squares, ridge, stored tasks and gradient descent make of the same examples
    descent        layers of linear attention that are steps of gradient descent, exactly
    diversity      how many tasks linear attention must be trained on before it learns new ones: exact errors
    coins          coins of unknown bias, and what exactly is to be believed after each flip
    fingerprint    one hash of all that a model has learnt

Everything public can be imported from here; `functions` and `coins` are modules of small parts, taken as such.
"""

from nondual.language_models.in_context_learning import coins, functions
from nondual.language_models.in_context_learning.descent import DescentByAttention, descent_layer
from nondual.language_models.in_context_learning.diversity import Errors, errors, limit_errors, optimal_matrix
from nondual.language_models.in_context_learning.fingerprint import fingerprint
from nondual.language_models.in_context_learning.functions import Prompts, curriculum, prompts
from nondual.language_models.in_context_learning.predictors import (
    gradient_descent,
    least_squares,
    predict,
    ridge,
    stored_tasks,
)
from nondual.language_models.in_context_learning.regressor import InContextRegressor

__all__ = [
    "DescentByAttention",
    "Errors",
    "InContextRegressor",
    "Prompts",
    "coins",
    "curriculum",
    "descent_layer",
    "errors",
    "fingerprint",
    "functions",
    "gradient_descent",
    "least_squares",
    "limit_errors",
    "optimal_matrix",
    "predict",
    "prompts",
    "ridge",
    "stored_tasks",
]
