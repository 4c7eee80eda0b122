"""What stands before an example: templates, their filters, and mode tokens."""

import re

import gin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain import cli
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError
from t5x_domain.objectives.prefix import NO_TOKENS, Metadata, Mode, prefix_ids

VOCABULARY = ByteVocabulary(extra_ids=10)
LAW = {"url": "https://en.wikipedia.org/wiki/Law", "date": "2024-05-01", "source": "wikipedia"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A SentencePiece vocabulary without special tokens."""
    path = str(tmp_path_factory.mktemp("vocabulary") / "words.model")
    train_sentencepiece(["heart liver kidney disease"] * 20, path, 275)
    return Vocabulary(path, 10)


# --- Templates.


def test_the_first_template_that_suits():
    metadata = Metadata(("{url:domain}, {date}: ", "URL: {url:domain}\n\n", "{source} | "))
    assert metadata.text(LAW) == "en.wikipedia.org, 2024-05-01: "
    assert metadata.text({"url": LAW["url"], "source": "wikipedia"}) == "URL: en.wikipedia.org\n\n"
    assert metadata.text({"source": "wikipedia", "date": "2024"}) == "wikipedia | "
    assert metadata.text({"date": "2024"}) == "", "no template suits"
    assert metadata.text({}) == ""
    assert metadata.field_sets == [{"url", "date"}, {"url"}, {"source"}]


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_field_without_value_is_missing(nothing):
    metadata = Metadata(("URL: {url}\n\n", "Date: {date}\n\n"))
    assert metadata.text({"url": nothing, "date": "2024"}) == "Date: 2024\n\n"
    assert metadata.text({"url": nothing, "date": nothing}) == ""


@pytest.mark.parametrize("value, text", [(0, "0"), (2.5, "2.5"), (False, "False"), (["a", "b"], "a, b"), ([1], "1")])
def test_values_that_are_no_text(value, text):
    assert Metadata(("<{x}>",)).text({"x": value}) == f"<{text}>"


def test_a_last_template_without_fields_is_for_all_others():
    metadata = Metadata(("URL: {url:domain}\n\n", "URL: unknown\n\n"))
    assert metadata.text(LAW) == "URL: en.wikipedia.org\n\n"
    assert metadata.text({}) == "URL: unknown\n\n"
    metadata.check_fields(set(), "corpus 'law'")


def test_default_is_that_of_the_paper():
    """MeCo, section 2: `URL: en.wikipedia.org` and an empty line."""
    assert Metadata().text(LAW) == "URL: en.wikipedia.org\n\n"
    assert (Metadata().rate, Metadata().fields) == (1.0, None)


def test_braces_and_repeated_fields():
    assert (
        Metadata(("{{{date}}} {date} {source}{source}}}",)).text(LAW) == "{2024-05-01} 2024-05-01 wikipediawikipedia}"
    )


def test_a_single_template_may_stand_alone():
    assert Metadata("Date: {date} ") == Metadata(("Date: {date} ",))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.one_of(st.none(), st.text(max_size=3)), max_size=3))
def test_a_template_is_used_whole_or_not_at_all(fields):
    text = Metadata(("<{a}|{b}>", "<{b}|{c}>")).text(fields)
    a, b, c = (fields.get(name) for name in "abc")
    assert text == (f"<{a}|{b}>" if a and b else f"<{b}|{c}>" if b and c else "")


# --- Filters.


@pytest.mark.parametrize(
    "url, domain, suffix",
    [
        ("https://en.wikipedia.org/wiki/Law", "en.wikipedia.org", "org"),
        ("http://www.bbc.co.uk/news?x=1", "www.bbc.co.uk", "uk"),
        ("example.com", "example.com", "com"),
        ("https://example.com", "example.com", "com"),
        ("https://localhost/x.html", "localhost", "localhost"),
        ("https://web.archive.org/web/http://a.b/c", "web.archive.org", "org"),
        ("ftp://example.com/x", "ftp:", "ftp:"),  # MeCo cuts http and https only
    ],
)
def test_domain_and_suffix(url, domain, suffix):
    assert re.sub("https?://", "", url).split("/")[0] == domain, "MeCo's own expression and its cut at the first /"
    assert Metadata(("{url:domain}",)).text({"url": url}) == domain
    assert Metadata(("{url:suffix}",)).text({"url": url}) == suffix
    assert Metadata(("{url}",)).text({"url": url}) == url


def test_hash_is_stable():
    """`printf en.wikipedia.org | b2sum -l 32` gives 66b7bbfe, and of the whole address 39bcac11. It is part of what a
    model has learnt, so it may never change."""
    assert Metadata(("Site: {url:domain,hash}\n\n",)).text(LAW) == "Site: 66b7bbfe\n\n"
    assert Metadata(("{url:hash}",)).text(LAW) == "39bcac11"
    other = {"url": "https://en.wikipedia.org/wiki/Medicine"}
    assert Metadata(("{url:domain,hash}",)).text(other) == "66b7bbfe", "the site, whatever the page"
    assert Metadata(("{url:hash}",)).text(other) != "39bcac11"


def test_filters_apply_in_order():
    """Filters read from the left: the domain of a hash is the hash."""
    assert Metadata(("{url:hash,domain}",)).text(LAW) == "39bcac11"


# --- Fields that are given instead.


def test_given_fields_stand_for_every_document():
    metadata = Metadata(("URL: {url:domain}\n\n", "Date: {date}\n\n"), fields={"url": "https://www.medicine.org/"})
    assert metadata.text(LAW) == metadata.text({}) == "URL: www.medicine.org\n\n"
    assert Metadata(("Date: {date}\n\n",), fields={"url": "x"}).text(LAW) == "", "not the document's own date"
    assert Metadata(("Date: {date}\n\n",), fields={}).text(LAW) == "", "none at all was given"


def test_check_fields():
    metadata = Metadata(("{url:domain} {date}", "{source}"))
    metadata.check_fields({"source", "title"}, "corpus 'law'")
    metadata.check_fields({"url", "date"}, "corpus 'law'")
    with pytest.raises(
        UserError,
        match="Metadata.templates need the fields date, source, which nothing in corpus 'law' has; "
        "the fields there are: title, url",
    ):
        metadata.check_fields({"url", "title"}, "corpus 'law'")
    with pytest.raises(UserError, match="need the field url, which nothing in corpus 'law' has; .*there are: none"):
        Metadata().check_fields(set(), "corpus 'law'")
    given = Metadata(fields={"domain": "x.org"})
    with pytest.raises(UserError, match="the given metadata name the field domain, but .* have only url"):
        given.check_fields({"url"}, "corpus 'law'")
    # Nor may a misspelt field fall back to a template without fields.
    with pytest.raises(UserError, match="the given metadata name the field sorce, but .* have only source"):
        Metadata(("{source}:", "?:"), fields={"sorce": "GO"}).check_fields({"source"}, "corpus 'law'")
    Metadata(fields={"url": "x.org"}).check_fields(set(), "corpus 'law'")


# --- Ids.


def test_ids_are_cut():
    metadata = Metadata(max_tokens=8)
    np.testing.assert_array_equal(metadata.ids(LAW, VOCABULARY), VOCABULARY.encode("URL: en."))
    assert len(Metadata(max_tokens=1).ids(LAW, VOCABULARY)) == 1
    whole = Metadata(max_tokens=64).ids(LAW, VOCABULARY)
    assert VOCABULARY.decode(whole) == "URL: en.wikipedia.org\n\n"
    assert whole.dtype == np.int32
    nothing = metadata.ids({}, VOCABULARY)
    assert nothing.dtype == np.int32 and nothing.shape == (0,)


def test_metadata_then_mode(words):
    text = VOCABULARY.encode("URL: en.wikipedia.org\n\n")
    mode = VOCABULARY.encode("[NLU]")
    both = prefix_ids(VOCABULARY, metadata=Metadata(), fields=LAW, mode=Mode("[NLU]"))
    assert both.tolist() == [*text, *mode]
    assert both.dtype == np.int32
    assert prefix_ids(VOCABULARY, metadata=Metadata(), fields=LAW).tolist() == text.tolist()
    assert prefix_ids(VOCABULARY, mode=Mode("[NLU]")).tolist() == mode.tolist()
    assert prefix_ids(VOCABULARY, metadata=Metadata(), fields={}, mode=Mode("[NLU]")).tolist() == mode.tolist()
    assert prefix_ids(VOCABULARY, metadata=Metadata(), mode=Mode("[NLU]")).tolist() == mode.tolist()
    assert prefix_ids(VOCABULARY).shape == NO_TOKENS.shape == (0,)
    assert prefix_ids(VOCABULARY, metadata=Metadata(max_tokens=3), fields=LAW, mode=Mode("[NLU]")).tolist() == [
        *text[:3],
        *mode,
    ], "a mode token is never cut"
    pieces = prefix_ids(words, metadata=Metadata(("heart ",)), mode=Mode("liver"))
    assert words.decode(pieces) == "heart liver"
    assert words.unk_id not in pieces


def test_fingerprint():
    """What changes the ids of a document's metadata changes it; what only changes who carries them does not."""
    metadata = Metadata()
    assert metadata.fingerprint == Metadata(rate=0.5).fingerprint == Metadata(["URL: {url:domain}\n\n"]).fingerprint
    others = [
        Metadata(("URL: {url}\n\n",)),
        Metadata(max_tokens=63),
        Metadata(fields={"url": "x"}),
        Metadata(fields={}),
    ]
    assert len({metadata.fingerprint, *(other.fingerprint for other in others)}) == 5


# --- Modes.


def test_mode_as_text():
    assert VOCABULARY.decode(Mode("[S2S]").ids(VOCABULARY)) == "[S2S]"
    assert Mode("[S2S]").ids(VOCABULARY).dtype == np.int32
    with pytest.raises(UserError, match="cannot write the mode token ''"):
        Mode("").ids(VOCABULARY)


def test_a_vocabulary_that_cannot_write_the_mode(tmp_path):
    """Without byte fallback, letters that were not seen in training become the unknown piece."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba aab"] * 20),
        model_prefix=str(tmp_path / "ab"),
        vocab_size=8,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    vocabulary = Vocabulary(str(tmp_path / "ab.model"), 10)
    assert len(Mode("ab").ids(vocabulary))
    with pytest.raises(UserError, match=r"the vocabulary cannot write the mode token '\[R\]'.*Mode.as_text=False"):
        Mode("[R]").ids(vocabulary)


def test_mode_of_its_own_needs_its_vocabulary(words):
    for vocabulary in (words, VOCABULARY):
        with pytest.raises(UserError, match=r"no id of its own for '\[R\]'.*`prepare`.*mode_form='text'"):
            Mode("[R]", as_text=False).ids(vocabulary)


# --- Mistakes, and gin.


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"templates": ()}, "Metadata.templates is empty"),
        ({"templates": ""}, "Metadata.templates is empty"),
        ({"templates": ("{}",)}, r"Metadata.templates: '\{\}' must name fields as \{name\} or \{name:filter\}"),
        ({"templates": ("{url!r}",)}, r"Metadata.templates: '\{url!r\}' must name fields as"),
        (
            {"templates": ("{url:host}",)},
            "Metadata.templates: .* has the filter 'host', not one of domain, suffix, hash",
        ),
        ({"templates": ("{url:domain,md5}",)}, "has the filter 'md5', not one of"),
        ({"templates": ("{date:%Y}",)}, "has the filter '%Y', not one of"),
        ({"templates": ("URL: {url",)}, r"Metadata.templates: 'URL: \{url' is no template: expected '\}'"),
        ({"templates": ("URL: url}",)}, r"Metadata.templates: 'URL: url\}' is no template: Single '\}'"),
        ({"templates": ("{url}", "{")}, r"Metadata.templates: '\{' is no template"),
        ({"rate": 1.01}, "Metadata.rate=1.01 must lie between 0 and 1"),
        ({"rate": -0.1}, "Metadata.rate=-0.1 must lie between 0 and 1"),
        ({"rate": float("nan")}, "Metadata.rate=nan must lie between 0 and 1"),
        ({"max_tokens": 0}, "Metadata.max_tokens=0 must be at least 1"),
    ],
)
def test_mistakes(knobs, message):
    with pytest.raises(UserError, match=message) as error:
        Metadata(**knobs)
    assert "\n" not in str(error.value).split("\n  In call")[0]


def test_from_gin():
    bindings = [
        "Metadata.templates = ('URL: {url:domain,hash}\\n\\n', 'Unknown.\\n\\n')",
        "Metadata.rate = 0.9",
        "Metadata.fields = {'url': 'https://x.org/y'}",
        "Mode.token = '[R]'",
        "Mode.as_text = False",
    ]
    try:
        cli.load_gin([], bindings)
        metadata, mode = cli.build(Metadata), cli.build(Mode)
    finally:
        gin.clear_config()
    assert metadata == Metadata(
        ("URL: {url:domain,hash}\n\n", "Unknown.\n\n"), rate=0.9, fields={"url": "https://x.org/y"}
    )
    assert mode == Mode("[R]", as_text=False)
