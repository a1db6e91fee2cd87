"""Types of options that pydantic checks: ranges of numbers, and choices of names."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError


def matching(pattern: str, words: str) -> AfterValidator:
    """Return a validator that refuses a text unless the pattern matches all of it.

    words: end of the error message "must be …".
    """

    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise PydanticCustomError("text", "must be {words}", {"words": words})
        return text

    return AfterValidator(checked)


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LARGEST_COSINE = 1.01  # rounding in low precision may give a cosine above 1
Cosine = Annotated[float, Field(ge=-LARGEST_COSINE, le=LARGEST_COSINE)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Size = Annotated[int, Field(ge=0, lt=2**31)]
# This is not Literal[1, 2], because that type also accepts the value true.
Passes = Annotated[int, Field(ge=1, le=2)]
# The upper limit is needed, because a mistyped large number could exhaust the memory.
Depth = Annotated[int, Field(gt=0, le=1000)]
Width = Annotated[int, Field(gt=0, le=2**16)]
# PyTorch crashes if it cannot start the threads of a mistyped large number.
Threads = Annotated[int, Field(gt=0, le=1024)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=1000)]

MAGNITUDE_BINS = 31  # RandAugment has the magnitudes 0 to 30
Magnitude = Annotated[int, Field(ge=0, lt=MAGNITUDE_BINS)]

# names that options of protocols, methods and models accept
ValidationSplit = Literal["random", "stratified"]
Downsampling = Literal["max_pool", "stride"]
FeedbackInit = Literal["product", "kaiming", "kaiming_in", "default", "zeros"]
FeedbackShape = Literal["conv", "dense"]
WeightInit = Literal["default", "xavier", "kaiming", "orthogonal"]
SequentialInit = Literal["default", "kaiming", "xavier", "copy"]
Magnitudes = Literal["uniform", "batch", "fixed"]
Scale = Literal["weights", "xavier", "fan_out"]
Activation = Literal["relu", "tanh", "sigmoid", "identity"]
LocalPooling = Literal["average", "max"]
LocalReduction = Literal["sum", "half_sum", "mean"]
Skip = Literal["cut", "leak"]
Top = Literal["backprop", "direct"]

SampleKind = Literal["images", "features", "tokens"]

# names that options of the engine accept
LossName = Literal["cross_entropy", "squared_error"]
Precision = Literal["float32", "tf32", "bfloat16"]
MemoryFormat = Literal["auto", "contiguous", "channels_last"]
