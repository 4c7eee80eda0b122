"""Run by test_live_tokenizer.py in an environment that has transformers but not this package.

    python tokenize_lines.py FOLDER SAVE_TO < request > answer

The request is JSON {"texts": […], "ids": [[…], …]}; the answer has the ids of the texts and the texts of the ids.
"""

import json
import sys

from transformers import AutoTokenizer

folder, save_to = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
request = json.load(sys.stdin)
answer = {
    "size": len(tokenizer),
    "specials": [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
    "ids": [tokenizer(text)["input_ids"] for text in request["texts"]],
    "texts": [tokenizer.decode(ids) for ids in request["ids"]],
}
tokenizer.save_pretrained(save_to)
json.dump(answer, sys.stdout)
