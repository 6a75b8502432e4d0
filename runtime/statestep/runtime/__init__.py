"""Streams and their recurrent state: a pure core that knows ONNX and numpy, and nothing of where messages come from."""

from statestep.runtime.contract import NO_TIME, Contract, ContractError, Feature, Output, State, stamp
from statestep.runtime.engine import CLEAN, Advanced, Engine, Model, Records
from statestep.runtime.guard import ModelError
from statestep.runtime.invariance import rows_agree
from statestep.runtime.model import StepModel, session_options
from statestep.runtime.pairs import detect
from statestep.runtime.silence import Silence, silence_of
from statestep.runtime.state import CapacityError

__all__ = [
    "CLEAN",
    "NO_TIME",
    "Advanced",
    "CapacityError",
    "Contract",
    "ContractError",
    "Engine",
    "Feature",
    "Model",
    "ModelError",
    "Output",
    "Records",
    "Silence",
    "State",
    "StepModel",
    "detect",
    "rows_agree",
    "session_options",
    "silence_of",
    "stamp",
]
