"""Private names of TensorFlow, and names of its operations.

`tests/test_private_names.py` fails if one of them moves.
"""

import tensorflow as tf

# The shared name of a variable that lives as long as its handle.
from tensorflow.python.eager.context import anonymous_name  # noqa: F401

# Records which variables are read, by any code.
from tensorflow.python.eager.record import VariableWatcher  # noqa: F401

FuncGraph = tf.__internal__.FuncGraph  # of `tf.function`, not of loops and branches

# Operations that read only sizes, and operations that do not touch the data.
SHAPES = {"Rank", "Shape", "ShapeN", "Size"}
VIEWS = {"ExpandDims", "Identity", "Reshape", "Squeeze"}

# Operations whose output sizes depend only on the sizes of the inputs, and on integers
# among them.
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

# Attributes for colocation, and for the inputs that a call only reads.
COLOCATION, READ_ONLY = "_class", "_read_only_resource_inputs"

# In the name of the operation that keeps `tf.nn.moments` from a second derivative.
STOPPED_MEAN = "moments/StopGradient"
