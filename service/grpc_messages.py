"""The messages of the Open Inference Protocol over gRPC, as far as this service speaks it: what a `.proto` file would say, as data.

Names and numbers are the protocol's; `TABLE` is all there is to know of them. The classes are made when this module is imported, in a pool of
their own: in protobuf's common one they would clash with those of a client that is imported by the same process.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"

# A message, and its fields below it: number, name, type. Before the type of a field may stand `repeated`, `map` (from strings), or `oneof` and the group.
TABLE = """
ServerLiveRequest
ServerLiveResponse
    1 live bool
ServerReadyRequest
ServerReadyResponse
    1 ready bool
ModelReadyRequest
    1 name string
    2 version string
ModelReadyResponse
    1 ready bool
ServerMetadataRequest
ServerMetadataResponse
    1 name string
    2 version string
    3 extensions repeated string
ModelMetadataRequest
    1 name string
    2 version string
ModelMetadataResponse
    1 name string
    2 versions repeated string
    3 platform string
    4 inputs repeated ModelMetadataResponse.TensorMetadata
    5 outputs repeated ModelMetadataResponse.TensorMetadata
ModelMetadataResponse.TensorMetadata
    1 name string
    2 datatype string
    3 shape repeated int64

InferParameter
    1 bool_param oneof parameter_choice bool
    2 int64_param oneof parameter_choice int64
    3 string_param oneof parameter_choice string
    4 double_param oneof parameter_choice double
    5 uint64_param oneof parameter_choice uint64
InferTensorContents
    1 bool_contents repeated bool
    2 int_contents repeated int32
    3 int64_contents repeated int64
    4 uint_contents repeated uint32
    5 uint64_contents repeated uint64
    6 fp32_contents repeated float
    7 fp64_contents repeated double
    8 bytes_contents repeated bytes
ModelInferRequest
    1 model_name string
    2 model_version string
    3 id string
    4 parameters map InferParameter
    5 inputs repeated ModelInferRequest.InferInputTensor
    6 outputs repeated ModelInferRequest.InferRequestedOutputTensor
    7 raw_input_contents repeated bytes
ModelInferRequest.InferInputTensor
    1 name string
    2 datatype string
    3 shape repeated int64
    4 parameters map InferParameter
    5 contents InferTensorContents
ModelInferRequest.InferRequestedOutputTensor
    1 name string
    2 parameters map InferParameter
ModelInferResponse
    1 model_name string
    2 model_version string
    3 id string
    4 parameters map InferParameter
    5 outputs repeated ModelInferResponse.InferOutputTensor
    6 raw_output_contents repeated bytes
ModelInferResponse.InferOutputTensor
    1 name string
    2 datatype string
    3 shape repeated int64
    4 parameters map InferParameter
    5 contents InferTensorContents
ModelStreamInferResponse
    1 error_message string
    2 infer_response ModelInferResponse

ModelConfigRequest
    1 name string
    2 version string
ModelConfigResponse
    1 config ModelConfig
ModelConfig
    1 name string
    2 platform string
    3 version_policy ModelVersionPolicy
    4 max_batch_size int32
    5 input repeated ModelInput
    6 output repeated ModelOutput
    7 instance_group repeated ModelInstanceGroup
    13 sequence_batching oneof scheduling_choice ModelSequenceBatching
    17 backend string
    19 model_transaction_policy ModelTransactionPolicy
    24 response_cache ModelResponseCache
ModelVersionPolicy
    2 all oneof policy_choice ModelVersionPolicy.All
ModelVersionPolicy.All
ModelInput
    1 name string
    2 data_type DataType
    4 dims repeated int64
ModelOutput
    1 name string
    2 data_type DataType
    3 dims repeated int64
ModelInstanceGroup
    1 name string
ModelSequenceBatching
    1 max_sequence_idle_microseconds uint64
    4 oldest oneof strategy_choice ModelSequenceBatching.StrategyOldest
ModelSequenceBatching.StrategyOldest
    1 max_candidate_sequences int32
    3 max_queue_delay_microseconds uint64
ModelTransactionPolicy
    1 decoupled bool
ModelResponseCache
    1 enable bool

ModelStatisticsRequest
    1 name string
    2 version string
ModelStatisticsResponse
    1 model_stats repeated ModelStatistics
ModelStatistics
    1 name string
    2 version string
    3 last_inference uint64
    4 inference_count uint64
    5 execution_count uint64
    6 inference_stats InferStatistics
    7 batch_stats repeated InferBatchStatistics
    8 memory_usage repeated MemoryUsage
    9 response_stats map InferResponseStatistics
InferStatistics
    1 success StatisticDuration
    2 fail StatisticDuration
    3 queue StatisticDuration
    4 compute_input StatisticDuration
    5 compute_infer StatisticDuration
    6 compute_output StatisticDuration
    7 cache_hit StatisticDuration
    8 cache_miss StatisticDuration
StatisticDuration
    1 count uint64
    2 ns uint64
InferBatchStatistics
    1 batch_size uint64
    2 compute_input StatisticDuration
    3 compute_infer StatisticDuration
    4 compute_output StatisticDuration
InferResponseStatistics
    1 compute_infer StatisticDuration
    2 compute_output StatisticDuration
    3 success StatisticDuration
    4 fail StatisticDuration
MemoryUsage
    1 type string
    2 id int64
    3 byte_size uint64

RepositoryIndexRequest
    1 repository_name string
    2 ready bool
RepositoryIndexResponse
    1 models repeated RepositoryIndexResponse.ModelIndex
RepositoryIndexResponse.ModelIndex
    1 name string
    2 version string
    3 state string
    4 reason string
ModelRepositoryParameter
    1 bool_param oneof parameter_choice bool
    2 int64_param oneof parameter_choice int64
    3 string_param oneof parameter_choice string
    4 bytes_param oneof parameter_choice bytes
RepositoryModelLoadRequest
    1 repository_name string
    2 model_name string
    3 parameters map ModelRepositoryParameter
RepositoryModelLoadResponse
RepositoryModelUnloadRequest
    1 repository_name string
    2 model_name string
    3 parameters map ModelRepositoryParameter
RepositoryModelUnloadResponse
"""

DATA_TYPES = {"TYPE_INVALID": 0, "TYPE_INT64": 9, "TYPE_FP32": 11, "TYPE_STRING": 13}  # those that configurations name

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL, "int32": _Field.TYPE_INT32, "int64": _Field.TYPE_INT64, "uint32": _Field.TYPE_UINT32, "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT, "double": _Field.TYPE_DOUBLE, "string": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES,
}  # fmt: skip


def _file() -> Any:
    """The table as protobuf's own description of a file."""
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    enum = file.enum_type.add(name="DataType")
    for name, number in DATA_TYPES.items():
        enum.value.add(name=name, number=number)
    places: dict[str, Any] = {}
    for line in filter(None, TABLE.splitlines()):
        if line.startswith(" "):
            _add_field(places[name], f".{PACKAGE}.{name}", line.split())
        else:
            outer, _, own = (name := line).rpartition(".")
            places[name] = places[outer].nested_type.add(name=own) if outer else file.message_type.add(name=own)
    return file


def _add_field(message: Any, path: str, words: list[str]) -> None:
    number, name, *kind = words
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind[0] == "oneof":
        group = kind[1]
        if group not in (places := [one.name for one in message.oneof_decl]):
            message.oneof_decl.add(name=group)
        field.oneof_index = places.index(group) if group in places else len(places)
    elif kind[0] in ("repeated", "map"):
        field.label = _Field.LABEL_REPEATED
    if kind[0] == "map":
        entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
        _set_type(entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL), kind[-1])
        field.type, field.type_name = _Field.TYPE_MESSAGE, f"{path}.{entry.name}"
    else:
        _set_type(field, kind[-1])


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_file())


def message_class(name: str) -> Any:
    """The class of a message by its name in the table."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


InferParameter = message_class("InferParameter")
ModelInferRequest = message_class("ModelInferRequest")
ModelInferResponse = message_class("ModelInferResponse")
ModelStreamInferResponse = message_class("ModelStreamInferResponse")
