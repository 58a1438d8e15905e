"""
The demo model's answers about how this service is built. Every answer must stay true.
"""

from model.training.canned import canned

ANATOMY = (
    canned(
        """
        WHAT-IS [FineTuneLLM/this service/this project/this program/this software/this]? | What
        [does FineTuneLLM/does this service/does this project] do? | What is this [all about/for]? |
        What [can/could] I [use/do with] FineTuneLLM [for/]? | Why [should I use/use] FineTuneLLM? |
        What is FineTuneLLM [good for/used for/about]? | [What place is this/Where am I]? | What
        [have I/did I] [found/started/opened/installed] here? | What is the [purpose/point/goal] of
        this?
        """,
        "FineTuneLLM is a chat backend for a GGUF model that you fine-tuned.",
    ),
    canned(
        """
        How does [this/it/FineTuneLLM/all this/the service/the backend] work? | WHAT-IS the
        architecture? | How is [FineTuneLLM/it/this] [built/structured/organised/made up]? | How is
        it put together? | How do the services work together? | What [happens/is] [inside/under the
        hood]?
        """,
        "Three services, edge, inference and history, talk to each other only over NATS.",
    ),
    canned(
        """
        [What/Which] [services/parts/components/processes] [are there/do you have/does it have/run
        here]? | How many services [are there/do you have/run]? | [Name/List/Tell me] [all/] the
        services. | What [are/'re] the three services? | What does FineTuneLLM consist of? | Which
        three services?
        """,
        "There are three services: edge, inference and history.",
    ),
    canned(
        """
        WHAT-IS [edge/the edge/the edge service]? | What [does edge/does the edge] [service/] do?
        | What is [the/] edge [good for/for]? | Which service [speaks/does/serves] HTTP?
        """,
        "Edge is the HTTP service: it takes requests and streams the answers by SSE.",
    ),
    canned(
        """
        WHAT-IS [inference/the inference service]? | What does [the/] inference [service/] do?
        | [Which service/Who/Which part] [runs/loads] the model? | What is inference [good for/for]?
        | [Who/Which service] [generates/writes] the answers?
        """,
        "Inference loads the GGUF model and generates the answers, many at once.",
    ),
    canned(
        """
        WHAT-IS [history/the history service]? | What does [the/] history [service/] do?
        | [Which/What] service [remembers/keeps] [the conversations/what was said/the context]?
        | What is history [good for/for]? | [Who/Which part] keeps the [context/conversations]?
        """,
        "History keeps the conversations and gives each request its context.",
    ),
    canned(
        """
        WHAT-IS NATS? | [Why/What is] NATS [for/]? | What does NATS do? | What do you use NATS for?
        | How do [the/your/these] services [talk/communicate/speak/work] [with each
        other/together/]? | [What/Which] message [bus/broker/queue/system] [is used/do you use/is
        it]? | NEED NATS? | [Over/Through/By] what do the services [talk/communicate/exchange
        messages]? | What [connects/is between] the services?
        """,
        "NATS is the message system: the three services talk only over it.",
    ),
    canned(
        """
        WHAT-IS JetStream? | What is JetStream for? | Why JetStream? | Where is the log
        [kept/stored]? | What keeps the log? | Where [are/is] [the conversations/our
        conversation/the chats/everything] [kept/stored/logged/saved/written/put down]? | What
        happens to [the/our] conversations? | [Are/Do you] [my/the/our] [chats/messages]
        [stored/saved/logged/kept] [anywhere/on disk/]? | Do you [store/save/log/keep] [my
        messages/this/what I say]?
        """,
        "NATS JetStream keeps the log of all conversations; MongoDB can archive them.",
    ),
    canned(
        """
        How many [messages/exchanges/turns] [do/can/will] you [remember/keep/see]? | How
        [long/much/far back] [do/can/will] you remember? | How much [context/memory] do you have? |
        How [long/good/big/large] is your [memory/context]? | Do you remember our conversation? | Do
        you have a memory? | How does your memory work? | Do you [forget things/ever forget]? | What
        do you remember of [us/our talk/our chat]? | How [long/big] is the context window?
        """,
        "I remember the last 10 exchanges of each session.",
    ),
    canned(
        """
        [What is/Why] [MongoDB/Mongo] [for/used for/there]? | Why MongoDB? | What does MongoDB do? |
        What is [stored/saved/kept] in [MongoDB/Mongo]? | [Which/What] database [do you use/is
        used/is it]? | Where are [messages/the messages/old messages] [stored/archived]? | Where is
        the archive?
        """,
        "MongoDB stores an archive of the messages in the database finetuneLLM; it is optional.",
    ),
    canned(
        """
        [Which/What] [programming/] language [are you/is it/is this/is FineTuneLLM] written in? | In
        [which/what] [programming/] language [is FineTuneLLM/is it/are you] [written/made/coded]? |
        [Is it/Are you] [written/made/coded] in [Python/Go/Rust/Java/C]? | [What/Which] language is
        this? | What [are you/is it] [written/coded/programmed] in? | What programming language is
        used?
        """,
        "FineTuneLLM is written in Python.",
    ),
    canned(
        """
        What [runs/executes/drives/powers] [the/this/your] model? | WHAT-IS
        [llama.cpp/llama-cpp-python]? | Do you use llama.cpp? | [Which/What]
        [engine/library/backend/software] [do you use/is used /runs the model/is it/is underneath]?
        | How is the model run? | Why llama.cpp?
        """,
        "The model runs on llama.cpp through llama-cpp-python.",
    ),
    canned(
        """
        [What are/Tell me/Which are] the [sampling/default/] [defaults/settings/parameters]?
        | [Which/What] sampling [settings/parameters/defaults] [do you use/are used/are there]?
        | How are answers sampled? | How do you [sample/choose the next token]?
        """,
        "Temperature 0.5, top_p 0.9, top_k 40, repeat penalty 1.1 and at most 150 tokens.",
    ),
    canned(
        """
        [What is/What's/Tell me] [the/your] [default/sampling/usual/] temperature?
        | [Which/What] temperature [do you use/is the default/is used/is set]?
        """,
        "The default temperature is 0.5.",
    ),
    canned(
        """
        How long [can an answer be/are your answers/may an answer be]? | What [is/are] max[
        /_]tokens? | How many [tokens/words] [is an answer/can you write/are in an answer/at most]?
        | What is the [token limit/longest answer/limit of an answer]? | Is there a limit?
        """,
        "An answer has at most 150 tokens by default.",
    ),
    canned(
        """
        WHAT-IS [GGUF/a GGUF/a GGUF file/the GGUF format]? | What does GGUF [mean/stand for]?
        | [Which/What] [model/file] format [do you use/do you need/is used/must my model have]?
        """,
        "GGUF is the model file format of llama.cpp.",
    ),
    canned(
        """
        WHAT-IS [SSE/a server-sent event/server-sent events]? | What does SSE [mean/stand for]?
        """,
        "SSE means server-sent events: the answer arrives token by token over HTTP.",
    ),
    canned(
        """
        WHAT-IS [a session/session_id/a session id/the session id]? | What are sessions? | What is
        [session_id/a session/the session id] [for/good for]? | How do sessions work? | Can I have
        [several/two/many] [conversations/chats/sessions]? | HOW-TO start a new [chat/session]? |
        How do you tell [users/conversations/people] apart? | HOW-TO start a new conversation?
        """,
        "A session is one conversation; each session_id has its own memory.",
    ),
    canned(
        """
        [Is/Will] my [data/chat/text/conversation] [be/] [sent anywhere/sent
        away/shared/leaked/uploaded]? | Is [this/it/our chat] [private/safe/local/secure/offline]? |
        Do you [use/need] the internet? | Is my data [safe/secure/private]? | Do you send my data
        [away/anywhere]? | Do you run locally? | Are you connected to the internet? | Who [can
        read/sees/reads] [this/what I write/my data]? | Where does my data go? | Do you spy on me? |
        Do you phone home?
        """,
        "I run inside this service and send nothing to the internet.",
    ),
)
