"""What the application holds for its requests: the predictor, the gate, the settings and the last minute's figures."""

from __future__ import annotations

from fastapi import Request

from service.gate import Gate
from service.history import History
from service.predictor import Predictor
from service.settings import Settings


def predictor_of(request: Request) -> Predictor:
    predictor: Predictor = request.app.state.predictor
    return predictor


def history_of(request: Request) -> History:
    history: History = request.app.state.history
    return history


def gate_of(request: Request) -> Gate:
    gate: Gate = request.app.state.gate
    return gate


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings
