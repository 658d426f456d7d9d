"""data/tokenizer.py: exact ids, files both ways, chat rows and their masks."""
from data.tokenizer import TOY_TEMPLATE, Tokenizer


def toy() -> Tokenizer:
    words = [str(i) for i in range(100)] + ["plus", " plus", "<think>", "</think>"]
    return Tokenizer.from_words(words, ["<|user|>", "<|assistant|>", "<|end|>"], chat_template=TOY_TEMPLATE)


def test_toy_words_are_single_tokens():
    tok = toy()
    assert [tok.decode([i]) for i in tok.encode("<think>12 plus 312plus")] == ["<think>", "12", " plus", " ", "31", "2", "plus"]
    assert tok.encode("é") == list("é".encode())
    assert tok.vocab_size == 256 + 90 + 4 + 3


def test_toy_chat_row():
    tok = toy()
    user, assistant, end = (tok.special_tokens[t] for t in ("<|user|>", "<|assistant|>", "<|end|>"))
    messages = [{"role": "user", "content": "12"}, {"role": "assistant", "content": "<think>3</think>4"}]
    ids, mask = tok.apply_chat_template(messages)
    written = tok.encode("<think>3</think>4") + [end]
    assert ids == [user, *tok.encode("12"), assistant, *written]
    assert mask == [0, 0, 0] + [1] * len(written)
    assert tok.apply_chat_template(messages[:1], add_generation_prompt=True) == (ids[:3], [0, 0, 0])
