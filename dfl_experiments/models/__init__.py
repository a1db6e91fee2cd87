"""Networks as chains of blocks, independent of the method that trains them."""

from dfl_experiments.models.conv2 import conv2 as conv2
from dfl_experiments.models.conv3 import conv3 as conv3
from dfl_experiments.models.fc import fc as fc
from dfl_experiments.models.mixer import mixer as mixer
from dfl_experiments.models.resnet18 import resnet18 as resnet18
from dfl_experiments.models.torchvision_net import torchvision_net as torchvision_net
from dfl_experiments.models.vit import vit as vit
