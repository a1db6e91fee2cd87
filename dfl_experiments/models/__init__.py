"""Networks as chains of blocks. They know nothing of how they are trained."""

from dfl_experiments.models.conv3 import conv3 as conv3
from dfl_experiments.models.fc import fc as fc
from dfl_experiments.models.mixer import mixer as mixer
from dfl_experiments.models.resnet18 import resnet18 as resnet18
