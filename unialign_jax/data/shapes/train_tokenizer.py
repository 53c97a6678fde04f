"""Makes the packaged `shapes` tokenizer: `python -m unialign_jax.data.shapes.train_tokenizer [OUTPUT.json]`.

A Unigram model in T5's form. Its pieces are the words of the world's own texts, every printable ASCII character (so
that any English text survives a round trip), and everyday words and letter groups (so that the caption of a photograph
is not wholly spelled out); the scores are log frequencies, so the best segmentation takes a whole word where there is
one. `tokenizers`' own UnigramTrainer is not used for the pieces: with so few words it cuts common ones apart, and two
runs of it differ. The same code gives the same file.
"""

import collections
import math
import string
import sys
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from unialign_jax.data.shapes.tasks import shapes_texts
from unialign_jax.data.tokenizer import NUM_SENTINELS

VOCAB_SIZE = 512
_NUM_PER_STREAM = 1500
_SPECIAL = ("<pad>", "</s>", "<unk>")
_SPACE = "▁"
_PRINTABLE = string.ascii_letters + string.digits + string.punctuation

# Words that captions of photographs are full of, and groups of letters that spell the others; commonest first.
_EVERYDAY_WORDS = """
in The its his her their this that by as it for while under against behind front through across over into around out
along between beside another other some several various has have be he she they him them not all both man woman boy
girl child people person player dog cat bird horse bear hand head hair face eyes shirt jacket hat wearing wears holding
holds standing stands sitting sits walking looking playing sky cloud clouds sun light lights lighting sunlight shadow
shadows day night street road city building buildings wall walls window door room table chair bed floor field grass
tree trees water snow mountain beach car bus train bike boat sign plate food glass bowl cup ball game frame scene
image photo picture texture surface foreground view moment setting atmosphere bright dark light soft warm vibrant
clear brown gold silver beige wooden metal young old tall long slightly partially visible features adding creating
casting single change turn style colorful natural outdoor indoor urban positioned captures suggests stripes court hands
ground pants against text four five shown smiling
""".split()
_LETTER_GROUPS = """
ing er in th ed re an on es st en al or ar le at it ic ou ch ra ro la li ri ti te de ne se ma me lo co un sh us el il
ly ent tion ow oo ee ea ai ck ll ss nt nd ge ce ve ter
""".split()


def train_shapes_tokenizer(vocab_size: int = VOCAB_SIZE) -> tokenizers.Tokenizer:
    """A T5-style Unigram tokenizer of exactly `vocab_size` ids, sentinels included."""
    counts = collections.Counter()
    for text in shapes_texts(_NUM_PER_STREAM):
        for word in text.split():
            # Punctuation stands apart from words, as pieces of its own.
            counts[_SPACE + word.rstrip(string.punctuation)] += 1
    # Counts below the world's rarest word, falling in the order of the lists, so that no two pieces tie.
    rarest = min(counts.values())
    extra = [_SPACE, *(_SPACE + word for word in _EVERYDAY_WORDS), *_LETTER_GROUPS, *_PRINTABLE]
    room = vocab_size - NUM_SENTINELS - len(_SPECIAL) - len(counts)
    extra = [piece for piece in dict.fromkeys(extra) if piece not in counts]
    groups = [piece for piece in extra if not piece.startswith(_SPACE)]
    words = [piece for piece in extra if piece.startswith(_SPACE)][: room - len(groups)]
    for rank, piece in enumerate([*words, *groups]):
        counts[piece] = rarest / (2.0 + rank)

    total = sum(counts.values())
    pieces = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    vocab = [(token, 0.0) for token in _SPECIAL] + [(piece, round(math.log(n / total), 4)) for piece, n in pieces]
    if len(vocab) != vocab_size - NUM_SENTINELS:
        raise ValueError(f"{len(vocab)} pieces, expected {vocab_size - NUM_SENTINELS}: add or remove everyday words")

    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=_SPECIAL.index("<unk>"), byte_fallback=False))
    # As T5: compatibility forms are folded, runs of white space become one space.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens([*_SPECIAL, *(f"<extra_id_{i}>" for i in reversed(range(NUM_SENTINELS)))])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("tokenizer.json")
    tokenizer = train_shapes_tokenizer()
    tokenizer.save(str(output))
    print(f"wrote {output} ({tokenizer.get_vocab_size()} ids)")


if __name__ == "__main__":
    main()
