"""Chat templates: the tokens that transformers makes of the same conversations."""

import pytest
import transformers
from chat_templates import CHATML, LLAMA3, LLAVA_HF, NAMES, byte_level

from vlm_jax.data import Message, conversation
from vlm_jax.data.conversation import LINE, PLAIN, V1

TALK = [
    ("system", "a chat."),
    ("user", " what colour is it?"),
    ("assistant", "red!"),
    ("user", "no"),
    ("assistant", "5"),
]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAVA_HF, LINE, PLAIN, V1])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_conversation_and_a_prompt_have_the_tokens_of_transformers(template: str, count: int) -> None:
    ours, tokenizer = byte_level(), byte_level().tokenizer
    tokenizer.encode_special_tokens = False
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=NAMES[1], eos_token=NAMES[2], chat_template=template
    )
    parts = template == LLAVA_HF
    told = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in TALK[:count]
    ]
    prompt = told[-1]["role"] == "user"
    expected = peer.apply_chat_template(told, add_generation_prompt=prompt, tokenize=True, return_dict=False)
    found = conversation([Message(*each) for each in TALK[:count]], template, ours)
    assert found.tokens.tolist() == expected


def test_what_is_learned_is_what_a_template_of_transformers_says_is_the_answer() -> None:
    """In its own words, `{% generation %}`, which set apart the answer and its end."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ours, tokenizer = byte_level(), byte_level().tokenizer
    tokenizer.encode_special_tokens = False
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    told = [{"role": role, "content": text} for role, text in TALK]
    expected = peer.apply_chat_template(
        told, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    found = conversation([Message(*each) for each in TALK], template, ours)
    assert found.tokens.tolist() == expected["input_ids"]
    assert found.target.tolist() == [bool(mask) for mask in expected["assistant_masks"]] and found.target.any()
