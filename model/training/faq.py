"""What the demo model says about the service it runs in. Every answer here must stay true."""

from typing import NamedTuple

from model.training.wordings import wordings


class Canned(NamedTuple):
    """Wordings of one request, and the answers that are right."""

    asks: tuple[str, ...]
    answers: tuple[str, ...]


def canned(asks: str, *answers: str) -> Canned:
    return Canned(wordings(asks), answers)


FAQ = (
    canned(
        """
        Do I need a GPU? | Does it need a GPU? | Is a GPU required? | Do you need a GPU?
        | Does it run on a CPU?
        | Can it run without a GPU? | Do you run on a GPU? | What hardware do I need?
        """,
        "No GPU is needed: it runs on a CPU.",
    ),
    canned(
        """
        What is FineTuneLLM? | What's FineTuneLLM? | Tell me about FineTuneLLM.
        | Explain FineTuneLLM. | What is this service? | What is this project?
        | What does FineTuneLLM do? | What is this?
        """,
        "FineTuneLLM is a chat backend for a GGUF model that you fine-tuned.",
    ),
    canned(
        """
        How does this work? | How does FineTuneLLM work? | What is the architecture?
        | Describe the architecture. | How is FineTuneLLM built?
        | How do the services work together?
        """,
        "Three services, edge, inference and history, talk to each other only over NATS.",
    ),
    canned(
        """
        What services are there? | Which services are there? | How many services are there?
        | Name the services. | What are the three services? | What parts does FineTuneLLM have?
        | List the services.
        """,
        "There are three services: edge, inference and history.",
    ),
    canned(
        """
        What does edge do? | What is edge? | What is the edge service?
        | What does the edge service do? | What is the edge for?
        """,
        "Edge is the HTTP service: it takes requests and streams the answers by SSE.",
    ),
    canned(
        """
        What does inference do? | What is inference? | What is the inference service?
        | What does the inference service do? | Which service runs the model?
        | Who runs the model?
        """,
        "Inference loads the GGUF model and generates the answers, many at once.",
    ),
    canned(
        """
        What does history do? | What is history? | What is the history service?
        | What does the history service do? | Which service remembers the conversations?
        """,
        "History keeps the conversations and gives each request its context.",
    ),
    canned(
        """
        What is NATS? | Why NATS? | What is NATS for? | What does NATS do?
        | How do the services talk? | How do the services communicate? | What message bus is used?
        """,
        "NATS is the message system: the three services talk only over it.",
    ),
    canned(
        """
        What is JetStream? | What is JetStream for? | Why JetStream? | Where is the log kept?
        | What keeps the log?
        """,
        "NATS JetStream keeps the log of all conversations.",
    ),
    canned(
        """
        Which port do you use? | What port does it listen on? | What is the port?
        | Which port is it? | What port? | On which port does edge listen?
        | What port does the edge use? | Which port does the service run on?
        | What is the default port? | Where does it listen?
        """,
        "Edge listens on port 8002.",
    ),
    canned(
        """
        How do I use my own model? | How can I use my own model? | How do I load my own model?
        | How do I add my model? | Can I use my own model? | How do I change the model?
        | How can I change the model? | Where do I put my model? | Where does my GGUF go?
        | How do I replace the model? | How do I use my GGUF? | Can I use another model?
        | How do I use a different model? | How do I use my fine-tuned model?
        """,
        "Put your .gguf file into `model/` or set MODEL_PATH, then restart.",
    ),
    canned(
        """
        What is MODEL_PATH? | What does MODEL_PATH do? | How do I set the model path?
        | What is MODEL_PATH for?
        """,
        "MODEL_PATH names the GGUF file that is loaded; without it the one in `model/` is taken.",
    ),
    canned(
        """
        How many messages do you remember? | How long do you remember? | How much do you remember?
        | How long is your memory? | How good is your memory? | Do you remember our conversation?
        | How many exchanges do you remember? | Do you have a memory? | How does your memory work?
        | How much context do you have?
        """,
        "I remember the last 10 exchanges of each session.",
    ),
    canned(
        """
        How do I clear the history? | How can I clear the history? | Clear the history.
        | Clear history. | How do I reset the conversation? | Forget everything.
        | How do I make you forget? | Reset the conversation. | How do I start over?
        | How do I delete the context? | Can you forget everything? | Forget what I said.
        | How do I clear my session? | What does clear-history do? | What is /clear-history?
        """,
        "POST /clear-history forgets the context of a session.",
    ),
    canned(
        """
        How do I send a message? | How do I chat over HTTP? | What does POST /chat do?
        | What is /chat? | How do I call the API? | How do I use the API?
        | Which endpoint is for chat? | What is the chat endpoint? | Do you stream?
        | How are answers streamed? | How do I get a stream?
        """,
        "POST /chat with a prompt streams the tokens of the answer by SSE.",
    ),
    canned(
        """
        How do I see past messages? | How do I list the messages? | What does GET /messages do?
        | What is /messages? | How can I see old messages? | Where are past messages?
        | How do I read the history? | How do I list old conversations?
        """,
        "GET /messages lists the past messages.",
    ),
    canned(
        """
        How do I check the status? | What does GET /status do? | What is /status?
        | How do I see if the model is loaded? | Is the model loaded?
        | How do I know that it works? | Is the database connected? | What does /status show?
        | Are you online?
        """,
        "GET /status shows whether the model is loaded and the database is connected.",
    ),
    canned(
        """
        Do I need MongoDB? | Is MongoDB required? | Do I need Mongo? | Is Mongo needed?
        | Does it work without MongoDB? | Does it run without Mongo?
        | Can I use it without a database? | Do I need a database? | Is MongoDB optional?
        """,
        "No, MongoDB is optional: it stores an archive, and everything works without it.",
    ),
    canned(
        """
        What is MongoDB for? | Why MongoDB? | What is Mongo for? | What does MongoDB do?
        | What is stored in MongoDB? | Which database do you use? | What database is used?
        | Which database is it? | Where are messages stored? | Where is the archive?
        """,
        "MongoDB stores an archive of the messages in the database finetuneLLM; it is optional.",
    ),
    canned(
        """
        How do I set up MongoDB? | How do I connect MongoDB? | How do I configure Mongo?
        | What is MONGODB_URI? | How do I set the database? | Which setting is for MongoDB?
        | How do I connect the database?
        """,
        "Set MONGODB_URI to the address of your MongoDB; the database is called finetuneLLM.",
    ),
    canned(
        """
        How do I start it? | How do I run it? | How do I start FineTuneLLM?
        | How do I run FineTuneLLM? | How do I start the service? | How do I start the services?
        | What does just up do? | How do I launch it? | How can I run this?
        | How do I get started?
        """,
        "`just up` runs everything on one machine.",
    ),
    canned(
        """
        How do I run the tests? | How do I test it? | What does just test do?
        | How are the tests run? | How can I run the tests? | How do I test FineTuneLLM?
        | Where are the tests?
        """,
        "`just test` runs the tests.",
    ),
    canned(
        """
        How do I chat in the terminal? | What does just chat do? | Can I chat in the terminal?
        | Is there a terminal chat? | How do I chat from the command line?
        | Is there a command line client?
        """,
        "`just chat` chats in the terminal.",
    ),
    canned(
        """
        How do I train this model? | What does just train-demo do?
        | How do I train the demo model? | How do I retrain you? | Can I train you?
        | Can I train you again? | How do I train you?
        """,
        "`just train-demo` trains this demo model.",
    ),
    canned(
        """
        How do I configure it? | Where are the settings? | How do I change the settings?
        | How do I change a setting? | Where is the configuration? | How is it configured?
        | How do I configure FineTuneLLM? | What is .env for? | Where do I put settings?
        """,
        "Settings are environment variables, or lines of a .env file.",
    ),
    canned(
        """
        How do I scale it? | How do I scale inference? | Can it scale? | Does it scale?
        | How do I run more workers? | How do I add workers? | How do I run three workers?
        | How do I scale the service? | How does it scale? | Can I run several workers?
        """,
        "`docker compose up -d --scale inference=3` runs three inference workers.",
    ),
    canned(
        """
        Can I use Docker? | How do I use Docker? | How do I run it with Docker?
        | Is there a Docker setup? | Does it run in Docker?
        | How do I start it with docker compose? | Is there a docker compose file?
        """,
        "`docker compose up -d` starts NATS, MongoDB and the three services.",
    ),
    canned(
        """
        What language are you written in? | Which language is it written in?
        | What is it written in? | In which language is FineTuneLLM written?
        | What programming language is used? | Is it written in Python?
        | Which programming language is FineTuneLLM written in? | Are you written in Python?
        | What language is this written in? | Which language is this?
        """,
        "FineTuneLLM is written in Python.",
    ),
    canned(
        """
        What runs the model? | What is llama.cpp? | Do you use llama.cpp?
        | Which engine do you use? | What engine is used? | How is the model run?
        | What is llama-cpp-python? | Which library runs the model? | Why llama.cpp?
        """,
        "The model runs on llama.cpp through llama-cpp-python.",
    ),
    canned(
        """
        What are the sampling defaults? | Which sampling settings do you use?
        | What are the default settings? | How are answers sampled?
        | What are the sampling settings? | What sampling parameters are used?
        """,
        "Temperature 0.5, top_p 0.9, top_k 40, repeat penalty 1.1 and at most 150 tokens.",
    ),
    canned(
        """
        What is the temperature? | Which temperature do you use? | What is your temperature?
        | What temperature is the default? | What's the default temperature?
        """,
        "The default temperature is 0.5.",
    ),
    canned(
        """
        How long can an answer be? | What is max tokens? | How many tokens is an answer?
        | What is the token limit? | How long are your answers? | How many tokens can you write?
        """,
        "An answer has at most 150 tokens by default.",
    ),
    canned(
        """
        What is GGUF? | What's a GGUF? | What is a GGUF file? | Which model format do you use?
        | What format must my model have? | Which file format do you need?
        """,
        "GGUF is the model file format of llama.cpp.",
    ),
    canned(
        """
        What is SSE? | What does SSE mean? | What is a server-sent event?
        | What are server-sent events?
        """,
        "SSE means server-sent events: the answer arrives token by token over HTTP.",
    ),
    canned(
        """
        What is a session? | What are sessions? | What is session_id? | What is a session id?
        | How do sessions work? | Can I have several conversations?
        | How do I start a new conversation?
        """,
        "A session is one conversation; each session_id has its own memory.",
    ),
    canned(
        """
        Is my data sent anywhere? | Is this private? | Do you use the internet? | Is my data safe?
        | Do you send my data away? | Are you connected to the internet? | Do you run locally?
        | Is this local?
        """,
        "I run inside this service and send nothing to the internet.",
    ),
)
