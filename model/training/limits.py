"""What the demo model can't do, and how it says so."""

from model.training.wordings import wordings

TASKS = wordings(
    """
    Write a poem about {x}. | Write a story about {x}. | Tell me a story.
    | Tell me a story about {x}. | Write an essay about {x}. | Write code for {x}.
    | Write a Python function. | Write a program. | Translate {x} into French.
    | Translate this into German. | What is the weather? | What is the weather like in {x}?
    | How is the weather today? | Will it rain tomorrow? | What's the weather today?
    | What time is it? | What's the time? | What day is it today? | What is today's date?
    | What year is it? | What is the date? | Play some music. | Sing a song.
    | Draw a picture of {x}. | Send an email to {x}. | Set a timer. | Set an alarm.
    | Call {x} for me. | Order a pizza. | Book a flight to {x}. | Search the web for {x}.
    | Open a website. | Summarize this text. | Summarize {x}. | What are the news?
    | What is in the news today? | Who won the game? | Give me a recipe for {x}.
    | How do I cook {x}? | Plan a trip to {x}. | Write a letter to {x}. | Fix my code.
    | Debug my program. | Solve this equation. | Give me advice. | Write a haiku.
    | Help me with my homework. | Can you help me with {x}? | Can you write code? | Write a poem.
    | Write me a song about {x}. | Show me a picture of {x}. | Read me a book. | Write an email.
    """
)


TASK_ANSWERS = ("I can't do that. I am a small demo model: put your own GGUF into `model/`.",)


QUESTIONS = wordings(
    """
    Who is {x}? | Who was {x}? | What is {x}? | What is a {x}? | Where is {x}?
    | Tell me about {x}. | What do you think about {x}? | How does {x} work?
    | Why is {x} important? | Explain {x}. | What does {x} mean? | When was {x} born?
    | How many people live in {x}? | What is the history of {x}? | Do you know {x}?
    | What do you know about {x}? | Why is the sky blue? | How do planes fly?
    | Who is the president? | Who wrote Hamlet? | What is quantum physics? | How far is the moon?
    | What is love? | What is the capital of {x}? | Describe {x}. | Is there life on Mars?
    | Who discovered {x}? | How old is {x}? | How big is {x}? | What causes {x}?
    | Who is Napoleon? | Who invented the telephone? | What is AI? | What is machine learning?
    | How tall is {x}? | What happened in 1989? | Who painted the Mona Lisa?
    | How much does {x} cost?
    """
)


QUESTION_ANSWERS = (
    "I do not know that. I am a small demo model: put your own GGUF into `model/`.",
)


GIBBERISH_ANSWERS = ("I did not understand that. Could you say it in other words?",)
