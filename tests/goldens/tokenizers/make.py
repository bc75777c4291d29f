"""Writes the files beside it.

make.py sentencepiece    needs transformers==4.35.2 sentencepiece==0.1.99 "protobuf<5"
make.py json             needs tokenizers==0.22.2 (the version above pins one that is too old)
"""
import json, random, pathlib, sys

here = pathlib.Path(__file__).resolve().parent
given = json.loads((here.parent / "tokenizer_cases.json").read_text())
texts = [c["text"] for c in given["cases"]]
texts += ["<s><s>", "</s></s>a", "<unk>", "< s>", "<s", "<<s>>", "x<s>", "<s>▁", "▁<s>▁▁", " <s> <s> ", "a<unk>\n<unk>b", "▁▁▁", "<s> ", "> ▁x"]


def write(name, value):
    lines = {k: "[\n" + ",\n".join(json.dumps(x, ensure_ascii=False) for x in v) + "\n]" for k, v in value.items()}
    (here / name).write_text("{\n" + ",\n".join(f'"{k}": {v}' for k, v in lines.items()) + "\n}\n")


def sentencepiece():
    from transformers import LlamaTokenizer, logging
    logging.set_verbosity_error()
    rng = random.Random(5)
    slow = {legacy: LlamaTokenizer(str(here.parent / "tokenizer.model"), legacy=legacy) for legacy in (True, False)}
    encode = []
    for text in texts:
        case = {"text": text}
        for legacy, t in slow.items():
            for plain in (False, True):
                t.split_special_tokens = plain
                case[f"legacy_{legacy}{'_plain' if plain else ''}".lower()] = t.encode(text, add_special_tokens=False)
        special = any(s in text for s in ("<s>", "</s>", "<unk>", "▁"))
        if special or rng.random() < 0.1:
            encode.append(case)
    ids = [c["ids"] for c in given["decode_cases"]]
    piece_ids = {p: slow[True].sp_model.piece_to_id(p) for p in ("▁", "▁▁", "▁▁▁", "▁a", "a", "▁the")}
    ids += [[a, b, c] for a in (0, 1, 2, 13, 250, *piece_ids.values()) for b in (2, 200, *piece_ids.values()) for c in (1, piece_ids["▁a"])]
    for _ in range(200):
        ids.append([rng.choice([rng.randrange(3), rng.randrange(3, 259), rng.randrange(259, 32000), *piece_ids.values()]) for _ in range(rng.randrange(1, 9))])
    decode = []
    for i in ids:
        case = {"ids": i}
        for legacy, t in slow.items():
            for skip in (False, True):
                case[f"legacy_{legacy}{'_skip_special' if skip else ''}".lower()] = t.decode(i, skip_special_tokens=skip)
        decode.append(case)
    write("sentencepiece_cases.json", {"encode": encode, "decode": decode})


def corpus():
    words = "the a cat dogs sitting on in image Question Answer shows 2024 left right café naïve 猫 狗 日本語 😀".split()
    rng = random.Random(6)
    return [" ".join(rng.choice(words) for _ in range(12)) + rng.choice([".", "!", "\n", "  \n"]) for _ in range(400)]


def json_cases(tokenizer, name):
    rng = random.Random(7)
    vocab_size = tokenizer.get_vocab_size()
    more = ["<|begin|>x", "a<|eot|> b", "<|eot|>", "'Tis I'll we'RE", "12345678", "   leading", "tabs\t\t\tx", "\r\n\r\n", "日本語の猫😀"]
    encode = [{"text": t, "ids": tokenizer.encode(t, add_special_tokens=False).ids} for t in texts[::5] + more]
    ids = [c["ids"] for c in encode] + [[rng.randrange(vocab_size) for _ in range(rng.randrange(1, 12))] for _ in range(100)]
    low = min(300, vocab_size)
    ids += [[rng.randrange(low) for _ in range(rng.randrange(1, 12))] for _ in range(100)]
    decode = [{"ids": i, "decoded": tokenizer.decode(i, skip_special_tokens=False), "decoded_skip_special": tokenizer.decode(i, skip_special_tokens=True)} for i in ids]
    write(name, {"encode": encode, "decode": decode})


def byte_level():
    # The settings of Llama 3's tokenizer, with a vocabulary of our own.
    t = Tokenizer(models.BPE(ignore_merges=True))
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens(["<|begin|>", "<|eot|>"])
    t.add_tokens([AddedToken("<猫>", normalized=False)])
    t.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", t.token_to_id("<|begin|>"))])
    t.save(str(here / "byte_level.json"), pretty=False)
    json_cases(t, "byte_level_cases.json")


def byte_fallback():
    # The settings of Llama's converted tokenizer, with a vocabulary of our own.
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    model = json.loads(t.to_str())["model"]
    vocab = {p: i for p, i in model["vocab"].items() if i < 3}
    for p in [f"<0x{b:02X}>" for b in range(256)] + [p for p, i in model["vocab"].items() if i >= 3]:
        vocab[p] = len(vocab)
    merges = [tuple(m) for m in model["merges"]]
    full = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    full.normalizer = t.normalizer
    full.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    full.add_special_tokens([AddedToken(s, normalized=False) for s in ("<unk>", "<s>", "</s>")])
    full.save(str(here / "byte_fallback.json"), pretty=False)
    json_cases(full, "byte_fallback_cases.json")


if sys.argv[1] == "sentencepiece":
    sentencepiece()
else:
    from tokenizers import Tokenizer, AddedToken, Regex, models, pre_tokenizers, decoders, normalizers, processors, trainers
    byte_level()
    byte_fallback()
