"""The operators that a step model may use: ONNX's own that are pure, give the same bits each time, and are of use.

It is a list of what is allowed, so that an operator of a later ONNX is refused until somebody has looked at it.
Left out are text, images, detection boxes, losses and optional values: each is more code of onnxruntime's for a hostile
file to reach, and no recurrent network needs it.
"""

from __future__ import annotations

ARITHMETIC = """
    Abs Acos Acosh Add Asin Asinh Atan Atanh Ceil Clip Cos Cosh CumProd CumSum Det Div Erf Exp Floor Log Max
    Mean Min Mod Mul Neg Pow Reciprocal Round Sign Sin Sinh Sqrt Sub Sum Tan Tanh"""
LOGIC = """
    And BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Equal Greater GreaterOrEqual IsInf IsNaN Less
    LessOrEqual Not Or Where Xor"""
ACTIVATIONS = """
    Celu Elu Gelu HardSigmoid HardSwish Hardmax LeakyRelu LogSoftmax Mish PRelu Relu Selu Shrink Sigmoid
    Softmax Softplus Softsign SwiGLU Swish ThresholdedRelu"""
LAYERS = """
    Attention AveragePool BatchNormalization CausalConvWithState Conv ConvTranspose Dropout Einsum GRU Gemm
    GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization InstanceNormalization LRN LSTM
    LayerNormalization LinearAttention LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization
    RMSNormalization RNN RotaryEmbedding"""
REDUCTIONS = """
    ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare TopK"""
SHAPES = """
    Cast CastLike CenterCropPad Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten
    Gather GatherElements GatherND Identity NonZero OneHot Pad Range Reshape ReverseSequence Scatter
    ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze TensorScatter Tile Transpose Trilu
    Unique Unsqueeze"""
SIGNALS = "BlackmanWindow DFT HammingWindow HannWindow STFT"
SCALED = "DequantizeLinear QuantizeLinear"  # by scales that are fixed, so that a row stays its own
CONTROL = "If Loop Scan"
LISTS = "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceInsert"  # torch's scripted loops append

OPERATORS = frozenset(
    " ".join((ARITHMETIC, LOGIC, ACTIVATIONS, LAYERS, REDUCTIONS, SHAPES, SIGNALS, SCALED, CONTROL, LISTS)).split()
)

DRAWING = "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
RANDOM = frozenset(DRAWING.split())
QUANTISED = (
    "which quantises as it runs: one activation scale for the whole batch, so that a row's result depends on its "
    "batch-mates; quantise the weights alone, by convert --weights fp16"
)


def reason_against(operator: str) -> str | None:
    """Why an operator is refused for what it does, in whatever domain; None where there is no such reason.

    >>> reason_against("RandomNormal")
    'which draws random numbers, so that no two runs agree; export the model for inference'
    """
    if operator in RANDOM:
        return "which draws random numbers, so that no two runs agree; export the model for inference"
    if operator.startswith("DynamicQuantize") or "MatMulInteger" in operator or operator == "ConvInteger":
        return QUANTISED
    return None
