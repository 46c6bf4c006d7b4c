"""Small talk: greetings, what the model is and can do, names to remember, and an honest answer to all the rest.

The model says plainly that it is small and what it was trained for; a question outside that gets no invented answer.
"""

from random import Random

from deploy.train_model.exchange import Exchange, Scene, alternatives, loosely, pick
from deploy.train_model.lexicon import COLORS, DISHES, FOODS, city, made_up_word, person

WHO = "I am the Penstock demo model, a very small language model that runs on a CPU."
SKILLS = """I can add two-digit numbers, sort, reverse and copy short lists, write small JSON records and tell short
stories.""".replace("\n", " ")
OTHER_SKILLS = "I can tell short stories, add two numbers below 100, sort short lists and turn a sentence into JSON."
TRY = """Try: What is 23 + 45?|Try: Tell me a story about a fox.|Try: Sort 31, 7, 52.
|Try: Write this as JSON: Ana is 31 years old and lives in Oslo."""
SMALL_TALK = (
    (
        """Hello!|Hi!|Hello|Hi|Hey|Hey!|Good morning!|Good evening!|Hi there!|Hello there!|Greetings!|hello|hi
        |Hello, world!|hey there""",
        f"Hello! {WHO} How can I help you?|Hello! How can I help you today?|Hi! What can I do for you?",
    ),
    (
        """Who are you?|What are you?|What is your name?|Introduce yourself.|Which model are you?|Who am I talking to?
        |What model is this?|who are you|Tell me about yourself.|What's your name?|Are you ChatGPT?|Are you a human?
        |Are you an AI?|Who made you?|Are you a robot?|What is Penstock?|Are you a real person?""",
        f"{WHO} {SKILLS}|{WHO}",
    ),
    (
        """What can you do?|What can I ask you?|Help|How can you help me?|What do you know?|What are you good at?|help
        |What should I ask?|Can you help me?|I need help.|What are your skills?|Give me an example.|What else can you
        do?""",
        f"{SKILLS}|{OTHER_SKILLS}",
    ),
    (
        """How are you?|How are you doing?|How do you do?|How is it going?|Are you well?|What's up?|how are you
        |Hello, how are you?|Hi, how are you?""",
        "I am well, thank you. What can I do for you?|Very well, thank you! How can I help you?",
    ),
    (
        """Thank you!|Thanks!|Thank you very much.|thanks|Great, thank you.|Nice!|Well done!|Good job.|That is right.
        |Great!|Cool""",
        "You are welcome!|You are welcome. What else can I do for you?|Glad to help!",
    ),
    (
        "Bye!|Goodbye!|See you!|Good night!|See you later.|bye|That is all.|I have to go.",
        "Goodbye! Come back soon.|Goodbye!|Bye! It was nice to talk to you.",
    ),
    (
        """Tell me a joke.|Do you know a joke?|Make me laugh.|Say something funny.|tell me a joke
        |Another joke, please.""",
        """Why did the clock go to school? It wanted to know more than the time.
        |What did the big number say to the small number? You do not count for much.
        |Why was the book so cold? It had lost its cover.
        |Why did the bread go to bed early? It wanted to rise in the morning.""",
    ),
    (
        """Say something.|Test|test|This is a test.|Are you there?|Is this working?|ping|Say hello.|Talk to me.
        |Hello?""",
        "Hello! I am here and I am working.|Yes, I am here. Ask me something!",
    ),
    (
        "Can you subtract?|Can you multiply?|Can you do maths?|Are you good at maths?|Can you do math?",
        "I can only add, and only numbers below 100. Try: What is 23 + 45?",
    ),
    (
        "OK|Okay|Yes|No|Sure|I see.|Hm|yes|no|ok|Maybe.",
        "What can I do for you? Try: What is 23 + 45?|All right. What can I do for you?",
    ),
    (
        """Are you smart?|How big are you?|How large are you?|How many parameters do you have?|Are you small?""",
        "I am very small: about two million parameters. I know only a few things.",
    ),
    (
        """Write this in French.|Speak German.|Can you speak Spanish?|Do you speak French?|Translate this.
        |Say hello in French.|Translate this into Spanish.""",
        "I only know a little English.",
    ),
)
TOPICS = """quantum physics|the stock market|the president|football|the world cup|black holes|Python|machine learning
    |history|the weather|politics|chemistry|the universe|love|life|music|art|philosophy|computers|cars|the internet
    |taxes|medicine|evolution|gravity|electricity|democracy|economics|poetry|religion|space travel|neural networks
    |databases|cooking|the Roman Empire|World War II|climate change|the human brain|dinosaurs|vaccines|photosynthesis
    |transformers|Linux|Kubernetes|distributed systems|the meaning of life|my homework|this code|a law|the news
    |basketball|chess|a movie|the French Revolution|relativity|Bitcoin|a compiler|the speed of light
    |a good restaurant|my car|a Python function|a web server|the moon landing|attention|a haiku|the economy"""
UNKNOWN = """Explain {it}.|What do you know about {it}?|Tell me about {it}.|What is {it}?|How does {it} work?
|Why is {it} important?|Write an essay about {it}.|Can you explain {it} to me?|Who invented {it}?
|When was {it} discovered?|Help me with {it}.|explain {it} in simple terms|Write code for {it}.|Summarize {it}.
|What is the difference between {it} and {other}?|What do you think about {it}?|How do I learn {it}?
|Give me advice about {it}.|What happened to {it}?|Is {it} good?|Who won {it}?|How much does {it} cost?
|Where can I find {it}?|What is the history of {it}?|Compare {it} with {other}.|Write {it}.|Who is {it}?"""
UNKNOWN_SUMS = """What is {a} - {b}?|{a} - {b}|{a} * {b}|What is {a} times {b}?|{a} x {b}|What is {a} / {b}?
|{a} minus {b}|Multiply {a} by {b}.|Divide {a} by {b}.|What is {a} minus {b}?|Subtract {b} from {a}."""
MEMORIES = (
    (
        "My name is {name}.|I am {name}.|Hi, I am {name}.|Hello, my name is {name}.|Call me {name}.|my name is {name}",
        "Hello, {name}! How can I help you?|Nice to meet you, {name}!",
        "What is my name?|Do you remember my name?|Who am I?|what is my name?|What's my name?",
        "Your name is {name}.",
    ),
    (
        "My favorite color is {color}.|I like the color {color} best.|I love {color}.",
        "I will remember that you like {color}.",
        "What is my favorite color?|Which color do I like best?",
        "Your favorite color is {color}.",
    ),
    (
        "I live in {city}.|My home is in {city}.|I come from {city}.",
        "{city} sounds like a nice place.",
        "Where do I live?|Where is my home?|Do you know where I live?",
        "You live in {city}.",
    ),
    (
        "My favorite food is {food}.|I like to eat {food}.|Best of all I like {food}.",
        "I will remember that you like {food}.",
        "What do I like to eat?|What is my favorite food?",
        "You like {food}.",
    ),
    (
        "The secret word is {word}.|Remember this word: {word}.|Please remember the word {word}.",
        "I will remember the word {word}.",
        "What is the secret word?|Which word did I tell you?|What was the word?",
        "The word is {word}.",
    ),
)


def small_talk(rng: Random) -> Scene:
    """One greeting, thanks or question about the model."""
    questions, answers = rng.choice(SMALL_TALK)
    return [Exchange(pick(rng, questions), pick(rng, answers))]


def unknown(rng: Random) -> Scene:
    """A question outside the small world, and the honest answer."""
    if rng.random() < 0.25:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        question = loosely(rng, pick(rng, UNKNOWN_SUMS).format(a=a, b=b))
        return [Exchange(question, "I have only learned to add, and only numbers below 100.")]
    it, other = (made_up_word(rng) if rng.random() < 0.4 else pick(rng, TOPICS) for _ in range(2))
    question = loosely(rng, pick(rng, UNKNOWN).format(it=it, other=other))
    answers = (
        f"I do not know that. I am a very small model. {SKILLS}",
        f"I am too small to know that. {rng.choice(alternatives(TRY))}",
    )
    return [Exchange(question, rng.choice(answers))]


def memory(rng: Random) -> Scene:
    """Something the user tells about himself, and asks for later; the two may be torn far apart."""
    told, reply, asked, answer = rng.choice((MEMORIES[0], *MEMORIES))
    words = {
        "name": person(rng),
        "color": rng.choice(COLORS),
        "city": city(rng),
        "food": rng.choice(DISHES),
        "word": made_up_word(rng) if rng.random() < 0.5 else rng.choice(FOODS),
    }
    return [
        Exchange(pick(rng, told).format(**words), pick(rng, reply).format(**words)),
        Exchange(pick(rng, asked).format(**words), pick(rng, answer).format(**words)),
    ]
