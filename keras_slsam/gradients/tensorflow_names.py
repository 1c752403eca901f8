"""What has no public name on TensorFlow, and the names of its operations.

`tests/test_private_names.py` fails where one of them moves.
"""

import tensorflow as tf

# A variable that lives as long as its handle has this as its shared name.
from tensorflow.python.eager.context import anonymous_name  # noqa: F401

# What tells which variables are read, by anyone.
from tensorflow.python.eager.record import VariableWatcher  # noqa: F401

FuncGraph = tf.__internal__.FuncGraph  # of `tf.function`, not of loops and branches

# Operations that read only sizes, and those that do not touch the data.
SHAPES = {"Rank", "Shape", "ShapeN", "Size"}
VIEWS = {"ExpandDims", "Identity", "Reshape", "Squeeze"}

# Operations whose results have sizes that follow from those of what they read, and from
# the integers in it.
SIZED_BY_SIZES = VIEWS | {
    *("Abs", "AddN", "AddV2", "AvgPool", "BatchMatMulV2", "BiasAdd", "BroadcastTo"),
    *("Cast", "ConcatV2", "Conv2D", "Cos", "DepthwiseConv2dNative", "Einsum", "Elu"),
    *("Equal", "Erf", "Exp", "FusedBatchNormV3", "GatherV2", "Greater", "GreaterEqual"),
    *("IdentityN", "LeakyRelu", "Less", "LessEqual", "Log", "LogSoftmax", "LogicalAnd"),
    *("MatMul", "Max", "MaxPool", "Maximum", "Mean", "Min", "Minimum", "Mul", "Neg"),
    *("Pack", "Pad", "Pow", "RealDiv", "Relu", "Relu6", "Rsqrt", "SelectV2", "Selu"),
    *("Sigmoid", "Sin", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Square"),
    *("SquaredDifference", "StatelessRandomNormalV2", "StatelessRandomUniformV2"),
    *("StopGradient", "StridedSlice", "Sub", "Sum", "Tanh", "Tile", "Transpose"),
}

CONSTANT, READ, CHECKS = "Const", "ReadVariableOp", {"Assert", "If"}

# Attributes: what an operation stands beside, and what a call only reads.
COLOCATION, READ_ONLY = "_class", "_read_only_resource_inputs"
