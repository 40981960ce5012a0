"""All checks, by the part of the API that they ask about."""

from __future__ import annotations

from ruvon.doctor.groups import (
    auth,
    chat,
    chat_logprobs,
    chat_messages,
    chat_stream,
    completions,
    completions_logprobs,
    completions_stream,
    connection,
    errors,
    http,
    limits,
    models,
    operations,
    security,
    sse,
)

ALL = (
    *models.CHECKS,
    *chat.CHECKS,
    *chat_messages.CHECKS,
    *chat_logprobs.CHECKS,
    *chat_stream.CHECKS,
    *completions.CHECKS,
    *completions_logprobs.CHECKS,
    *completions_stream.CHECKS,
    *errors.CHECKS,
    *limits.CHECKS,
    *http.CHECKS,
    *sse.CHECKS,
    *connection.CHECKS,
    *auth.CHECKS,
    *operations.CHECKS,
    *security.CHECKS,
)
