"""What an option may be, as types that pydantic checks: ranges of numbers, and names to choose from."""

from typing import Annotated, Literal

from pydantic import Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LARGEST_COSINE = 1.01  # with what rounding adds in low precision
Cosine = Annotated[float, Field(ge=-LARGEST_COSINE, le=LARGEST_COSINE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Size = Annotated[int, Field(ge=0, lt=2**31)]
# not Literal[1, 2], which true would fit as well
Passes = Annotated[int, Field(ge=1, le=2)]
# larger ones are slips of the finger, and would be found out by a machine that runs out of memory
Depth = Annotated[int, Field(gt=0, le=1000)]
Width = Annotated[int, Field(gt=0, le=2**16)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=1000)]

MAGNITUDE_BINS = 31  # RandAugment's
Magnitude = Annotated[int, Field(ge=0, lt=MAGNITUDE_BINS)]

# what a protocol says and a method or a model does
Downsampling = Literal["max_pool", "stride"]
FeedbackInit = Literal["product", "kaiming", "default", "zeros"]
FeedbackShape = Literal["conv", "dense"]
SequentialInit = Literal["default", "kaiming", "xavier", "copy"]
Magnitudes = Literal["uniform", "batch", "fixed"]
Scale = Literal["weights", "xavier", "fan_out"]
Activation = Literal["relu", "tanh", "sigmoid", "identity"]
LocalPooling = Literal["average", "max"]
LocalReduction = Literal["sum", "half_sum", "mean"]
Skip = Literal["cut", "leak"]
Top = Literal["backprop", "direct"]

# what a run says and the engine does
LossName = Literal["cross_entropy", "squared_error"]
Precision = Literal["float32", "tf32", "bfloat16"]
MemoryFormat = Literal["auto", "contiguous", "channels_last"]
