"""What was rendered and encoded can be read back: no message, character or role is lost."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_byte_tokenizer
from tunesmith.data.encode import Pipeline
from tunesmith.data.templates import Renderer
from tunesmith.data.tokenize import Encoder
from tunesmith.errors import Problem
from tunesmith.types import Conversation, Message, Origin

TOKENIZER = make_byte_tokenizer()
RENDERER = Renderer(TOKENIZER)
ENCODER = Encoder(TOKENIZER.backend_tokenizer)
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"), max_size=30)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = draw(st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=4))
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages), Origin("d", 1))


@settings(deadline=None)
@given(conversations())
def test_messages_come_back_from_tokens(sample: Conversation) -> None:
    segments = RENDERER.render(sample)
    assert not isinstance(segments, Problem)
    (sequence,) = ENCODER.encode([segments])[0]
    text = TOKENIZER.decode(sequence.ids, skip_special_tokens=False)
    if "<|" not in "".join(message.content or "" for message in sample.messages):
        read = [Message(role, content) for role, content in TURN.findall(text)]
        assert tuple(read) == sample.messages
    answers = [message.content for message in sample.messages if message.role == "assistant"]
    learned = [TOKENIZER.decode(sequence.ids[first : first + n]) for first, n, _ in sequence.runs]
    assert learned == [f"{answer}<|im_end|>" for answer in answers]


@settings(deadline=None, max_examples=30)
@given(st.lists(conversations(), max_size=20))
def test_no_sample_is_lost_or_out_of_place_on_the_way_to_tokens(
    samples: list[Conversation],
) -> None:
    rows = [(number % 3, sample) for number, sample in enumerate(samples)]
    found = [item for batch in Pipeline(RENDERER).run(rows) for item in batch]
    assert [(source, sample) for source, sample, _ in found] == rows
    for _, sample, tokens in found:
        assert not isinstance(tokens, Problem) and not isinstance(sample, Problem)
        expected = ENCODER.encode([RENDERER.render(sample)])[0]  # type: ignore[list-item]
        assert all(a.same_as(b) for a, b in zip(tokens, expected, strict=True))
