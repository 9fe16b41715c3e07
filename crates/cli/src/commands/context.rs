//! `godwit context`: the controllers that this user works with.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use godwit_model::Name;
use serde::Serialize;

use crate::context::{Context, ContextError, Contexts, check_url};
use crate::error::Failure;
use crate::output::{OutputArgs, Table, note, or_nothing, print_data};

/// `godwit context`.
#[derive(Args)]
#[command(after_help = "Examples:
  godwit context create prod --url https://gw.example.org:7443 --token-file ~/.godwit.token --ca-file ca.pem
  godwit context use prod")]
pub(crate) struct ContextArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List contexts
    List,
    /// Make a context the current one
    Use {
        /// Its name
        name: Name,
    },
    /// Add a context; it becomes the current one if there is none
    Create {
        /// Its name
        name: Name,
        /// https://HOST:PORT of the controller
        #[arg(long)]
        url: String,
        /// File with the API token; it is read each time, never copied
        #[arg(long, value_name = "FILE")]
        token_file: PathBuf,
        /// Certificate of the cluster's authority (PEM)
        #[arg(long, value_name = "FILE")]
        ca_file: Option<PathBuf>,
    },
    /// Forget a context; its files stay
    Delete {
        /// Its name
        name: Name,
    },
}

#[derive(Serialize)]
struct Listed {
    name: Name,
    current: bool,
    #[serde(flatten)]
    context: Context,
}

pub(crate) fn run(args: ContextArgs) -> Result<(), Failure> {
    let contexts = Contexts::of_user()?;
    match args.verb {
        Verb::List => list(&contexts, &args.output),
        Verb::Use { name } => Ok(contexts.set_current(&name)?),
        Verb::Create { name, url, token_file, ca_file } => {
            if contexts.names()?.contains(&name) {
                return Err(ContextError::Exists { name }.into());
            }
            let ca_file = ca_file.as_deref().map(absolute).transpose()?;
            let context = Context { url: check_url(&url)?, token_file: absolute(&token_file)?, ca_file };
            context.endpoint()?;
            adopt(&contexts, &name, &context)
        }
        Verb::Delete { name } => {
            if contexts.remove(&name)? {
                Ok(())
            } else {
                Err(ContextError::Unknown { name }.into())
            }
        }
    }
}

/// Writes a context, and makes it the current one if there is none.
pub(crate) fn adopt(contexts: &Contexts, name: &Name, context: &Context) -> Result<(), Failure> {
    contexts.write(name, context)?;
    if contexts.current()?.is_none() {
        contexts.set_current(name)?;
    }
    let current = contexts.current()?.is_some_and(|current| current == *name);
    note(&if current {
        format!("context {name} is the current one")
    } else {
        format!("context {name} was written; `godwit context use {name}` makes it the current one")
    });
    Ok(())
}

fn list(contexts: &Contexts, output: &OutputArgs) -> Result<(), Failure> {
    let current = contexts.current()?;
    let mut listed = Vec::new();
    for name in contexts.names()? {
        let context = contexts.read(&name)?;
        listed.push(Listed { current: current.as_ref() == Some(&name), name, context });
    }
    print_data(output.output, &listed, || {
        let mut table = Table::new(&["NAME", "CURRENT", "URL", "TOKEN FILE", "CA FILE"]);
        for Listed { name, current, context } in &listed {
            table.row([
                name.to_string(),
                if *current { "yes".into() } else { String::new() },
                context.url.clone(),
                context.token_file.display().to_string(),
                or_nothing(context.ca_file.as_ref().map(|path| path.display())),
            ]);
        }
        table.render()
    })
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|source| Failure::File { action: "find", path: path.to_owned(), source })
}
