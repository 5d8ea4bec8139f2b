"""Serves IndRNN models from ONNX files: clips over REST, live streams over REST and websocket, state carried between."""
