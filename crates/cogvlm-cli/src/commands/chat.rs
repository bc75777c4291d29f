//! `chat`: several turns about one image. The KV cache of what was said stays, so a turn computes only what is new.

use std::io::IsTerminal;
use std::path::Path;

use cogvlm_core::Template;
use cogvlm_core::prompt::Turn;
use cogvlm_input::Tokenizer;
use cogvlm_pipeline::{CachedPrefix, Image, Request};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::answer;
use crate::args::{ChatArgs, SamplingArgs};
use crate::error::{CliError, CliResult};
use crate::output::{note, print, print_line};
use crate::prompt::{layout_of_text, open_tokenizer, read_image};
use crate::session::{Session, open_source};
use crate::stdin::StdinLines;

const HELP: &str = "commands: /image FILE  talk about another image\n          /reset       forget what was said\n          /help        this text\n          /exit        leave (so does Ctrl-D)";

/// A conversation so far.
struct Conversation {
    template: Template,
    image: Option<Image>,
    history: Vec<Turn>,
    prefix: Option<CachedPrefix>,
}

pub(crate) fn run(args: &ChatArgs) -> CliResult {
    let params = answer::sampling_params(&args.sampling)?;
    let source = open_source(&args.model.model)?;
    let tokenizer = open_tokenizer(args.tokenizer.tokenizer.as_ref(), &args.model.model)?;
    let template = args.template.map_or(source.spec().template, Into::into);
    let image = args.image.as_deref().map(|path| read_image(path, source.spec())).transpose()?;
    let Some(mut session) = Session::open(&args.model, source, false)? else { return Ok(()) };
    let mut conversation = Conversation { template, image, history: Vec::new(), prefix: None };
    let mut lines = Lines::open()?;
    if lines.interactive() {
        note(HELP);
    }
    while let Some(line) = lines.next()? {
        let outcome = match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/help" => {
                note(HELP);
                continue;
            }
            "/reset" => {
                conversation.forget();
                continue;
            }
            command if command.starts_with("/image") => {
                conversation.change_image(command.trim_start_matches("/image").trim(), &session)
            }
            _ => conversation.turn(&line, &mut session, &tokenizer, &params, &args.sampling),
        };
        // A turn that is refused ends a script, but not a conversation.
        match outcome {
            Err(error) if lines.interactive() => note(error.render().trim_end()),
            outcome => outcome?,
        }
    }
    Ok(())
}

impl Conversation {
    fn forget(&mut self) {
        self.history.clear();
        self.prefix = None;
    }

    fn change_image(&mut self, path: &str, session: &Session) -> CliResult {
        if path.is_empty() {
            return Err(CliError::new("`/image` needs the name of a file"));
        }
        self.image = Some(read_image(Path::new(path), session.engine.spec())?);
        self.forget();
        Ok(())
    }

    fn turn(
        &mut self, question: &str, session: &mut Session, tokenizer: &Tokenizer,
        params: &cogvlm_backend::SamplingParams, args: &SamplingArgs,
    ) -> CliResult {
        let spec = session.engine.spec().clone();
        let has_image = self.image.is_some();
        let (_, layout) = layout_of_text(&spec, tokenizer, self.template, question, &self.history, has_image)?;
        let context_len = session.plan.limits.context_len;
        let num_prompt = layout.input_ids.len();
        if num_prompt >= context_len {
            return Err(CliError::new(format!("the conversation has {num_prompt} tokens, the context {context_len}"))
                .hint("begin anew with `/reset`"));
        }
        let room = context_len - num_prompt;
        let request = Request {
            layout,
            image: self.image.clone(),
            params: params.clone(),
            max_new_tokens: args.max_new_tokens.unwrap_or(room),
            ignore_eos: false,
            forced: None,
            want_logits: false,
            capture: false,
            prefix: self.prefix.take(),
            keep_cache: true,
        };
        let answer = answer::run(&mut session.engine, request, Some(tokenizer), &args.stop, &mut |text| print(text))?;
        print_line("")?;
        self.prefix = answer.prefix;
        let text = answer.text.unwrap_or_default();
        self.history.push(Turn { question: question.to_owned(), answer: text.trim_start().to_owned() });
        Ok(())
    }
}

/// Lines from a person with an editor, or from a pipe.
enum Lines {
    Person(Box<DefaultEditor>),
    Pipe(StdinLines),
}

impl Lines {
    fn open() -> CliResult<Self> {
        if std::io::stdin().is_terminal() && std::io::stderr().is_terminal() {
            let editor =
                DefaultEditor::new().map_err(|error| CliError::new(format!("cannot use this terminal: {error}")))?;
            return Ok(Self::Person(Box::new(editor)));
        }
        Ok(Self::Pipe(StdinLines::lock()))
    }

    fn interactive(&self) -> bool {
        matches!(self, Self::Person(_))
    }

    fn next(&mut self) -> CliResult<Option<String>> {
        match self {
            Self::Person(editor) => match editor.readline("> ") {
                Ok(line) => {
                    // A history that cannot be kept is no reason to end a conversation.
                    drop(editor.add_history_entry(&line));
                    Ok(Some(line))
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                Err(error) => Err(CliError::new(format!("cannot read from this terminal: {error}"))),
            },
            Self::Pipe(lines) => {
                let failed =
                    |error: &dyn std::fmt::Display| CliError::new(format!("cannot read questions from stdin: {error}"));
                let line = lines.next().transpose().map_err(|error| failed(&error))?;
                line.map(String::from_utf8).transpose().map_err(|error| failed(&error))
            }
        }
    }
}
