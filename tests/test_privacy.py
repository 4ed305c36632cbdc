import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.evolve.privacy import MASK, mask, spans, unasked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to ada.lovelace+bike@example.co.uk, please", "write to <EMAIL>, please"),
        ("my page (https://example.org/~ada?x=1).", "my page (<URL>)."),
        ("see www.example.com/shop for it", "see <URL> for it"),
        ("call me at 0961-7596216", "call me at <PHONE>"),
        ("+44 (0)20 7946 0958 is mine", "<PHONE> is mine"),
        ("781 1704 office", "<PHONE> office"),
        ("pay with 4111 1111 1111 1111 now", "pay with <CARD> now"),
        ("card 4222222222222", "card <CARD>"),
        ("to GB82 WEST 1234 5698 7654 32", "to <IBAN>"),
        ("to BE68 5390 0754 7034 by Friday", "to <IBAN> by Friday"),
        ("to BE68539007547034 to me from Bert", "to <IBAN> to me from Bert"),
        ("AT61 1904 3002 3457 3201 please", "<IBAN> please"),
        ("my card is 4111 1111 1111 1111 12/26", "my card is <CARD> 12/26"),
        ("Visa 4111-1111-1111-1111 123, Amex 378282246310005 1234", "Visa <CARD> 123, Amex <CARD_2> 1234"),
        ("on 05 4111 1111 1111 1111", "on 05 <CARD>"),
        ("my card number is 4111 1111 1111 1111 12/26", "my card number is <CARD> 12/26"),
        ("call me; 4111 1111 1111 1111 05", "call me; <CARD> 05"),
        ("Amex 3782 822463 10005 1234", "Amex <CARD> 1234"),
        ("card 2223 0031 2200 3222 12/26", "card <CARD> 12/26"),
        ("CVV 123 4111 1111 1111 1111", "CVV 123 <CARD>"),
        ("card 4111 1111 1111 1111-12/26", "card <CARD>-12/26"),
        ("API_KEY=sesamesesame; it is", "API_KEY=<SECRET>; it is"),
        (
            "`API_KEY=monkeybusiness` or client_secret='supersecretvalue'.",
            "`API_KEY=<SECRET>` or client_secret='<SECRET_2>'.",
        ),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic <SECRET>"),
        ("api_key = 'sesame.sesame.sesame'.", "api_key = '<SECRET>'."),
        ("Authorization: Bearer opensesame.opensesame", "Authorization: Bearer <SECRET>"),
        ("blocked: 192.0.2.17, and 2001:db8::8a2e:370:7334", "blocked: <IP>, and <IP_2>"),
        ("SSN 078-05-1120", "SSN <SSN>"),
        ("the password is hunter22!", "the password is <SECRET>"),
        ("API_KEY=abc123def456", "API_KEY=<SECRET>"),
        ("my password is correcthorsebattery", "my password is <SECRET>"),
        ("The wifi password for the shop is Sunshine2024!", "The wifi password for the shop is <SECRET>"),
        ("password: hunter, user: ann", "password: <SECRET>, user: ann"),
        ('{"password": "correct horse"}', '{"password": "<SECRET>"}'),
        ("**Passphrase:** hunter.", "**Passphrase:** <SECRET>."),
        ("my pwd = b'hunter'", "my pwd = b'<SECRET>'"),
        ("the password was good and is now set to letmein", "the password was good and is now set to letmein"),
        ("the password is now set to letmein", "the password is now set to <SECRET>"),
        ("my pin is 4821 and my PIN number: 48 22", "my pin is <SECRET> and my PIN number: <SECRET_2>"),
        ("change the pin on my account to be 1234", "change the pin on my account to be <SECRET>"),
        ("change my password to hunter2", "change my password to <SECRET>"),
        ("my password is ha'penny, thanks", "my password is <SECRET>, thanks"),
        ("make my pin 1234", "make my pin <SECRET>"),
        ("my password is ada@example.org", "my password is <EMAIL>"),
        ("https://example.org/?password=hunter", "<URL>"),
        ("Phone:555-123-4567", "Phone:<PHONE>"),
        ('Tel.:555-123-4567 {"phone":"555-123-4568"}', 'Tel.:<PHONE> {"phone":"<PHONE_2>"}'),
        ("555\u2012123\u20124567, 4111\u20091111\u20071111\u20091111", "<PHONE>, <CARD>"),
        ("redis://cache:6379,ada@example.org", "redis://cache:6379,<EMAIL>"),
        ("Ring +49\u00a030\u00a01234567", "Ring <PHONE>"),
        ("555\u2011123\u20114567, 555\u2010123\u20104568, 555\u2013123\u20134569", "<PHONE>, <PHONE_2>, <PHONE_3>"),
        ("card 4111\u202f1111\u00a01111\u00a01111", "card <CARD>"),
        ("postgres://app:s3c!ret@db.example.org/shop", "postgres://app:<SECRET>@db.example.org/shop"),
        (
            r'{"a":"{\"password\": \"hunter2 cat\",\"phone_number\": \"5551234567\", \"x\":\"Tel\\n555-123-4568\"}"}',
            r'{"a":"{\"password\": \"<SECRET>\",\"phone_number\": \"<PHONE>\", \"x\":\"Tel\\n<PHONE_2>\"}"}',
        ),
        (
            '{"phoneNumber":"5551234568"}, customer_phone=5551234569',
            '{"phoneNumber":"<PHONE>"}, customer_phone=<PHONE_2>',
        ),
        (
            "dbPassword: hunter, PGPASSWORD=tiger1 DB_PASS=lion",
            "dbPassword: <SECRET>, PGPASSWORD=<SECRET_2> DB_PASS=<SECRET_3>",
        ),
        ("<password>hunter</password> | Password | tiger |", "<password><SECRET></password> | Password | <SECRET_2> |"),
        ('{"password": "hunter2 horse battery"}', '{"password": "<SECRET>"}'),
        ("password: tiger!P@ss.word#rest", "password: <SECRET>"),
        ("password: hunter,22abc", "password: <SECRET>"),
        ("_555-123-4567_, __4111 1111 1111 1111__ and _123-45-6789_", "_<PHONE>_, __<CARD>__ and _<SSN>_"),
        ("Telefon 03012345678, SSN: 123456789, ssn 123 45 6780", "Telefon <PHONE>, SSN: <SSN>, ssn <SSN_2>"),
        ("to DE89-3704-0044-0532-0130-00", "to <IBAN>"),
        ("card 4111\u200b1111\u20031111 1111, ada\u200b@example.org", "card <CARD>, <EMAIL>"),
        ("refresh_token=abc123def456, AccountKey=abc123def456zz==", "refresh_token=<SECRET>, AccountKey=<SECRET_2>"),
        ("password: lovely, password=emily", "password: <SECRET>, password=<SECRET_2>"),
        (
            "192.168.1.11 is not 192.168.11.1, nor j.smith@x.org jsmith@x.org",
            "<IP> is not <IP_2>, nor <EMAIL> <EMAIL_2>",
        ),
        ("use sk-_abcdEFGH1234567890abcd ok", "use <SECRET> ok"),
        ("use glpat-abc-_defghijkl1234567890", "use <SECRET>"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.abc-_defGHIjkl_-qrstuvwxyz12", "<SECRET>"),
        ("john_@example.org and a._b@example.org", "<EMAIL> and <EMAIL_2>"),
        ("_Write to ada@example.org._", "_Write to <EMAIL>._"),
        ("ask ada@example.org.1 for it, by bob@example.org.--Bob", "ask <EMAIL>.1 for it, by <EMAIL_2>.--Bob"),
        ("Call me at 0171.1234567, ring 555.1234567 please", "Call me at <PHONE>, ring <PHONE_2> please"),
        ("redis://:hunter@cache and https://app:hunter@example.org", "redis://:<SECRET>@cache and <URL>"),
    ],
)
def test_personal_data_is_masked_by_its_kind(text: str, masked: str):
    assert mask([text]) == [masked]


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-" + "a1B2" * 8,
        "ghp_" + "x9Y8" * 9,
        "AKIA" + "ABCD1234" * 2,
        "AIza" + "Sy0-" * 9,
        "xoxb-" + "123456789012-abcdef",
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIB\nAAAA\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\ncut short",
    ],
)
def test_keys_are_masked_whole(secret: str):
    assert mask([f"use {secret}"]) == ["use <SECRET>"]


@pytest.mark.parametrize(
    "text",
    [
        "the order of 2024-01-15 20:15:24 came on 15.01.2024",
        "it costs 1299.95, or 1 000 000 for all 12345678 of them",
        "card number 4111111111111112 is not one",  # the check digit is wrong
        "GB82 WEST 1234 5698 7654 33",
        "version 1.2.3.400 at 10:15:20",
        "the password is forgotten",
        "my password is wrong, and the new one does not work",
        "is the password required?",
        "I forgot my password: what can I do?",
        "the password is 8 characters long and case-sensitive",
        "my password is being reset, as the old one is expired",
        "I forgot my password and my brother is angry",
        "the password for the shop isn't working",
        "a password that is secure and easy to remember",
        "the pin is on the map, the bowling pin is heavy, pin 13 is ground",
        "i cannot remember what my pin is for my bank of america account",
        "Password: don't share it. The password is 8-12 characters, what's new?",
        "change the password to 2 words, and the password to be safe",
        "Password: ******** (at least 8 characters)",
        "def login(user: str, password: str, pin: int = 0): password = getpass()",
        "password=self.password, passphrase=${DB_PASSPHRASE}, pwd = os.environ['PWD'], password = ''",
        "I ride a 28-inch wheel, size 37-622",
        "api_key = os.environ['KEY'], access_token=get_access_token(), api_key='your-api-key', the bearer opensesame",
        "Client(access_token=access_token), api_key = undefined, auth_token = response",
        "API_KEY=API_KEY_OF_ADA, API_KEY=settings.key",
        "Authorization: Bearer authentication is wanted, the client key = combination of name and day",
        "Adres no12 kırk altı sokak, bt21 ſechs kilo",  # letters that are no others without regard to case
        "1990\u20131994, from 10\u00a0000 \u2013 12\u00a0000, at 1:2345678 of postgres://app:${SECRET}@db",
        "x[::2], C::d, abc::def, pip install foo@1.2.3, react@18.2.0 from version 1.2.3.4",
        "0.123456789 of 6.02214076, arXiv 2507.15281, doi:10.1000/182, ISBN 0-306-40615-2, order number 1234567",
        "2019-2020-2021, 21-19 21-18 21-17, a budget of 100.000.000, 24.12.-31.12.2024, call at 10.30 11.30 12.30",
        "the password is recommended, the password is mine, safety pin: 100 pieces, password: required",
        " ".join(map(str, range(1, 31))),
        " ".join(map(str, range(1990, 2027))),
        "0 1 1 2 3 5 8 13 21 34 55 89 144 233 377 610 987 1597 2584 4181 6765",
        "3141 5926 5358 9793 2384 6264 3383 2795 4502 8841 9716",
    ],
)
def test_what_only_looks_like_it_stays(text: str):
    assert mask([text]) == [text]


def test_a_value_has_the_same_mask_in_every_text_of_a_row_and_others_have_others():
    row = ["I am a@x.org, she is b@x.org", "Noted: B@x.org and a@x.org."]
    assert mask(row) == ["I am <EMAIL>, she is <EMAIL_2>", "Noted: <EMAIL_2> and <EMAIL>."]
    assert mask(["call 555\u2011123\u20114567", "call 555-123-4567"]) == ["call <PHONE>", "call <PHONE>"]


@pytest.mark.parametrize(
    ("row", "masked"),
    [
        (
            ["my password is swordfish", "Swordfish, no swordfishes."],
            ["my password is <SECRET>", "<SECRET>, no swordfishes."],
        ),
        (["my mobile is 5551234567", "I saved 555-123-4567."], ["my mobile is <PHONE>", "I saved <PHONE>."]),
        (["credit card 4222222222222", "4222 2222 22222 is charged"], ["credit card <CARD>", "<CARD> is charged"]),
        (
            ["4821, I think", "OK", "my pin is 4821, not 48210"],
            ["<SECRET>, I think", "OK", "my pin is <SECRET>, not 48210"],
        ),
        (["What is your password?", "swordfish", "Welcome"], ["What is your password?", "<SECRET>", "Welcome"]),
        (
            ["password: abc-def", "abc-defg, ABC-DEF! or 9abc-def!"],
            ["password: <SECRET>", "abc-defg, <SECRET>! or 9abc-def!"],
        ),
        (
            ["Your password, please?", "Unluckily", "unluckily so"],
            ["Your password, please?", "<SECRET>", "unluckily so"],
        ),
        (
            ["Your password, please?", "tiger9", "tiger9 it is"],
            ["Your password, please?", "<SECRET>", "<SECRET> it is"],
        ),
        (["my phone is 555 1234", "12 555 1234 5, 5551234"], ["my phone is <PHONE>", "12 <PHONE> 5, <PHONE>"]),
        (["Your PIN, please?", "4821"], ["Your PIN, please?", "<SECRET>"]),
        (["What is your phone number?", "555 1234"], ["What is your phone number?", "<PHONE>"]),
        (["What's my password?", "Sorry, I do not know it."], ["What's my password?", "Sorry, I do not know it."]),
        (["What is a good password?", "Sure!"], ["What is a good password?", "Sure!"]),
        (["Can you tell me how to change my password?", "Settings."], None),
        (["Did you need my phone number?", "Yes, it is 2024."], None),
    ],
)
def test_what_one_text_of_a_row_tells_is_masked_in_all(row: list[str], masked: list[str] | None):
    assert mask(row) == (masked or row)


@given(st.text(max_size=200), st.text(max_size=50))
def test_masking_is_a_function_of_the_words_and_spans_never_overlap(a: str, b: str):
    assert mask([a, b]) == mask([a, b])
    found = spans(a)
    assert all(end <= start for (_, end, _), (start, _, _) in pairwise(found))


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "1",
        "1 ",
        "a.b@",
        "GB12 ",
        ":a",
        "password ",
        "password:",
        "password is ",
        "pin to ",
        "password for a b ",
        "pin 1 ",
        'pwd:"',
        "sk-",
        "www.",
        "http://",
        "x://a:",
        "1\u2013",
        "4 ",
        "4111 1111 1111 1111 ",
        "BE68 ",
        "api key=",
        "_",
        "\u200b1",
        '\\"',
        "token=",
        "pPassword:",
        "|pin|",
        "10.30 ",
    ],
)
def test_a_long_run_of_anything_takes_no_long_time(piece: str):
    start = time.process_time()
    mask([piece * (60_000 // len(piece))])
    assert time.process_time() - start < 5  # quadratic patterns took over 15


def test_a_text_that_tells_thousands_of_values_takes_no_long_time():
    each = "my password is pw{0}x9, or sk-abcdef{0}ghijklmnop, or call 555-{1:03d}-{2:04d}"
    told = " ".join(each.format(i, i // 100, i % 10_000) for i in range(2_000))
    start = time.process_time()
    mask([told, told])
    assert time.process_time() - start < 5  # a pattern for each took 7 and more


@pytest.mark.parametrize("words", ["my password is hunter22 passwd", "api key is", "secret"])
def test_a_long_gap_after_the_name_of_a_secret_takes_no_long_time(words: str):
    start = time.process_time()
    mask([words + " " * 30_000])
    assert time.process_time() - start < 5


def test_masks_are_known_again_and_tags_are_none():
    masked = mask(["ada@example.org, bob@example.org", "https://example.org"])
    assert MASK.findall(" ".join(masked)) == ["<EMAIL>", "<EMAIL_2>", "<URL>"]
    assert not MASK.search("<b>, <EMAILS>, <IP_>, EMAIL")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Call 020 7946 0018.", []),  # written with other gaps in the prompt
        ("Call 020 7946 0019.", ["020 7946 0019"]),
        ("Write to ADA@example.org or bob@example.org", ["bob@example.org"]),
        ("Call <PHONE>, we have 12 bikes.", []),
        ("Call 020\u20117946\u20110018.", []),
        ("Write to a@example.org, or look at 192.168.1.1", ["a@example.org", "192.168.1.1"]),
    ],
)
def test_values_that_stand_in_the_prompt_are_not_unasked(answer: str, found: list[str]):
    assert unasked(["I am ada@example.org at 192.168.11.1", "My phone: 020-7946-0018"], answer) == found
