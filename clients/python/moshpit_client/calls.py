"""The daemon's calls as callables: names, messages and sizes on the wire. Knows nothing of what they mean."""

from __future__ import annotations

import urllib.parse

import grpc

from moshpit_client.v1 import daemon_pb2 as pb

MESSAGE_BYTES_MAX = (4 << 20) + 1024
_SERVICE = "/moshpitd.local.v1.DaemonService/"
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # A daemon that is halted but not dead is noticed by its silence.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
)


class Calls:
    """One channel and the calls on it."""

    def __init__(self, socket: str) -> None:
        # A pool of its own: a channel shared with an earlier one would inherit its pause after a failed attempt.
        options = (*_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        self.channel = grpc.insecure_channel("unix:" + urllib.parse.quote(socket), options)
        self.open_session: grpc.UnaryStreamMultiCallable[pb.OpenSessionRequest, pb.OpenSessionResponse] = (
            self.channel.unary_stream(
                _SERVICE + "OpenSession", pb.OpenSessionRequest.SerializeToString, pb.OpenSessionResponse.FromString
            )
        )
        self.attach_shared_memory: grpc.UnaryUnaryMultiCallable[
            pb.AttachSharedMemoryRequest, pb.AttachSharedMemoryResponse
        ] = self.channel.unary_unary(
            _SERVICE + "AttachSharedMemory",
            pb.AttachSharedMemoryRequest.SerializeToString,
            pb.AttachSharedMemoryResponse.FromString,
        )
        self.close_session: grpc.UnaryUnaryMultiCallable[pb.CloseSessionRequest, pb.CloseSessionResponse] = (
            self.channel.unary_unary(
                _SERVICE + "CloseSession", pb.CloseSessionRequest.SerializeToString, pb.CloseSessionResponse.FromString
            )
        )
        self.set_compute_budget: grpc.UnaryUnaryMultiCallable[
            pb.SetComputeBudgetRequest, pb.SetComputeBudgetResponse
        ] = self.channel.unary_unary(
            _SERVICE + "SetComputeBudget",
            pb.SetComputeBudgetRequest.SerializeToString,
            pb.SetComputeBudgetResponse.FromString,
        )
        self.average: grpc.StreamStreamMultiCallable[pb.AverageRequest, pb.AverageResponse] = (
            self.channel.stream_stream(
                _SERVICE + "Average", pb.AverageRequest.SerializeToString, pb.AverageResponse.FromString
            )
        )
        self.fetch_feedback: grpc.UnaryStreamMultiCallable[pb.FetchFeedbackRequest, pb.FetchFeedbackResponse] = (
            self.channel.unary_stream(
                _SERVICE + "FetchFeedback",
                pb.FetchFeedbackRequest.SerializeToString,
                pb.FetchFeedbackResponse.FromString,
            )
        )
        self.load_feedback: grpc.StreamUnaryMultiCallable[pb.LoadFeedbackRequest, pb.LoadFeedbackResponse] = (
            self.channel.stream_unary(
                _SERVICE + "LoadFeedback",
                pb.LoadFeedbackRequest.SerializeToString,
                pb.LoadFeedbackResponse.FromString,
            )
        )
        self.get_status: grpc.UnaryUnaryMultiCallable[pb.GetStatusRequest, pb.GetStatusResponse] = (
            self.channel.unary_unary(
                _SERVICE + "GetStatus", pb.GetStatusRequest.SerializeToString, pb.GetStatusResponse.FromString
            )
        )
        self.list_peers: grpc.UnaryUnaryMultiCallable[pb.ListPeersRequest, pb.ListPeersResponse] = (
            self.channel.unary_unary(
                _SERVICE + "ListPeers", pb.ListPeersRequest.SerializeToString, pb.ListPeersResponse.FromString
            )
        )
        self.list_rounds: grpc.UnaryUnaryMultiCallable[pb.ListRoundsRequest, pb.ListRoundsResponse] = (
            self.channel.unary_unary(
                _SERVICE + "ListRounds", pb.ListRoundsRequest.SerializeToString, pb.ListRoundsResponse.FromString
            )
        )
        self.get_config: grpc.UnaryUnaryMultiCallable[pb.GetConfigRequest, pb.GetConfigResponse] = (
            self.channel.unary_unary(
                _SERVICE + "GetConfig", pb.GetConfigRequest.SerializeToString, pb.GetConfigResponse.FromString
            )
        )
